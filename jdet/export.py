"""Generation, exported: lowered on any machine for another platform, saved, loaded there, run.

    jdet.export.save("step.jdet", model, platform="tpu", batch_size=8, prompt_length=512,
                     max_tokens=128)                       # on a machine without a TPU
    generate = jdet.export.load("step.jdet", model)        # on the TPU's
    tokens = generate(prompts, prompt_lengths, sampling)

The file holds the program of `generate_tokens` (a prefill and the loop of decode steps) as
`jax.export` lowers it, not the weights, and what the bits depend on: contract, implementation,
versions. `load` refuses a file that another contract, implementation, model or version of jax has
made. The program is compiled where it is loaded, with jdet's options. Needs the extra `export`.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array, Int32

from jdet.compiler import jit
from jdet.completion import LanguageModel
from jdet.decoding import GeneratedTokens, generate_tokens
from jdet.sampling import SamplingArrays, SamplingParams, sampling_arrays

# jit puts numpy arrays on the device.
Given = Array | np.ndarray

PLATFORMS = ("cpu", "cuda", "tpu")
# Implementations that are for one platform; the others are jnp, and for all.
_ONLY_ON = {"mosaic_gpu": "cuda", "jax_triton": "cuda", "mosaic_tpu": "tpu"}
_MAGIC = b"jdet export 1\n"


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself, ahead of its program.

    Attributes:
      platform: that it was lowered for.
      implementation, contract, fingerprint: of the ops in it.
      versions: of jax and jaxlib.
      batch_size, prompt_length, max_tokens: its shapes.
      weights: shape and dtype of each of the decoder's arrays.
      digest: SHA-256 of the program.
    """

    platform: str
    implementation: str
    contract: dict[str, int]
    fingerprint: str
    versions: dict[str, str]
    batch_size: int
    prompt_length: int
    max_tokens: int
    weights: list[str]
    digest: str


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}


def _weights(leaves: Sequence[Any]) -> list[str]:
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]


def _needs_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("jdet.export needs flatbuffers: pip install 'jdet[export]'")


def _shapes(leaves: Sequence[Any], batch_size: int, prompt_length: int) -> tuple[Any, ...]:
    """What a program takes: weights, prompts, their lengths, the fields of `SamplingArrays`."""
    rows = [SamplingParams(temperature=0)] * batch_size
    prompts = jax.ShapeDtypeStruct((batch_size, prompt_length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return weights, prompts, lengths, *jax.eval_shape(lambda: sampling_arrays(rows))


def save(
    path: str | os.PathLike[str],
    model: LanguageModel,
    *,
    platform: str,
    batch_size: int,
    prompt_length: int,
    max_tokens: int,
) -> Header:
    """Lower `generate_tokens` of a model for a platform and write it to `path`.

    Only the shapes of the model's weights are used: `jax.eval_shape` may have made them.

    Raises:
      ValueError: an unknown platform, one that the model's implementation is not for, or sizes
        that are no positive integers or exceed the model's context length.
      ImportError: flatbuffers is not installed.
    """
    ops, config = model.ops, model.decoder.config
    if platform not in PLATFORMS:
        raise ValueError(f"platform={platform!r}; allowed: {', '.join(PLATFORMS)}")
    only = _ONLY_ON.get(ops.implementation, platform)
    if platform != only:
        raise ValueError(f"platform={platform!r}: {ops.implementation} is for {only} alone")
    sizes = {"batch_size": batch_size, "prompt_length": prompt_length, "max_tokens": max_tokens}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}; allowed: integers from 1")
    limit = config.max_position_embeddings
    if prompt_length + max_tokens > limit:
        raise ValueError(
            f"prompt_length={prompt_length} and max_tokens={max_tokens}; together at most "
            f"{limit}, the model's context length"
        )
    _needs_flatbuffers()
    leaves, tree = jax.tree.flatten(model.decoder)

    # Lists of arrays alone: a file needs no class of this library's.
    def run(weights: list[Array], prompts: Any, lengths: Any, *sampling: Array) -> list[Array]:
        decoder = jax.tree.unflatten(tree, weights)
        arrays = SamplingArrays(*sampling)
        return list(
            generate_tokens(decoder, prompts, lengths, arrays, max_tokens=max_tokens, ops=ops)
        )

    shapes = _shapes(leaves, batch_size, prompt_length)
    exported = jax_export.export(jax.jit(run), platforms=(platform,))(*shapes)
    program = bytes(exported.serialize())
    header = Header(
        platform=platform,
        implementation=ops.implementation,
        contract=dataclasses.asdict(ops.contract),
        fingerprint=ops.fingerprint,
        versions=_versions(),
        **sizes,
        weights=_weights(leaves),
        digest=hashlib.sha256(program).hexdigest(),
    )
    line = json.dumps(dataclasses.asdict(header)).encode() + b"\n"
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(_MAGIC + line + program)
    os.replace(partial, path)
    return header


def _read(path: Path) -> tuple[Header, bytes]:
    """(what a file says of itself, its program).

    Raises:
      ValueError: it is none of `save`'s, or damaged.
    """
    magic, _, rest = path.read_bytes().partition(b"\n")
    if magic + b"\n" != _MAGIC:
        raise ValueError(f"{path} is no file of jdet.export's, or one of another format")
    line, _, program = rest.partition(b"\n")
    try:
        header = Header(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if hashlib.sha256(program).hexdigest() != header.digest:
        raise ValueError(f"{path} is damaged: its program has another digest than it says")
    return header, program


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a file says of itself; nothing is compiled.

    Raises:
      ValueError: it is none of `save`'s, or damaged.
    """
    return _read(Path(path))[0]


class Generate:
    """A loaded program with a model's weights: `generate_tokens` of the file's shapes.

    Attributes:
      header: what the file says of itself.
      program: as `jax.export` has it.
    """

    def __init__(self, header: Header, program: jax_export.Exported, weights: list[Any]) -> None:
        self.header, self.program = header, program
        self._weights = weights
        self._run = jit(program.call, implementation=header.implementation)
        # After the weights come the arguments of a call, in order.
        self._given = program.in_avals[len(weights) :]

    def __call__(
        self,
        prompts: Int32[Given, "B P"],
        prompt_lengths: Int32[Given, " B"],
        sampling: SamplingArrays,
    ) -> GeneratedTokens:
        """Generate for right-padded prompts; results as of `jdet.generate_tokens`, bit for bit.

        Raises:
          ValueError: arrays of other shapes than the file's.
        """
        arrays = {"prompts": prompts, "prompt_lengths": prompt_lengths, **sampling._asdict()}
        for (name, x), wanted in zip(arrays.items(), self._given, strict=True):
            if (x.shape, x.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"{name} is {x.dtype}{list(x.shape)}; this file takes "
                    f"{wanted.dtype}{list(wanted.shape)}"
                )
        return GeneratedTokens(*self._run(self._weights, *arrays.values()))


def load(path: str | os.PathLike[str], model: LanguageModel) -> Generate:
    """Read what `save` wrote, to be run with the weights of `model` on the default device.

    Raises:
      ValueError: the file is damaged, or it was made with another version of jax, for another
        platform, contract, implementation or shape of weights than are here; all of them are named.
      ImportError: flatbuffers is not installed.
      EnvironmentRefused: XLA_FLAGS holds a flag against the promise.
    """
    _needs_flatbuffers()
    path = Path(path)
    header, program = _read(path)
    leaves, ops = jax.tree.leaves(model.decoder), model.ops
    backend = jax.default_backend()
    here = {
        **_versions(),
        "platform": "cuda" if backend == "gpu" else backend,
        "implementation": ops.implementation,
        "contract": dataclasses.asdict(ops.contract),
        # Also what is not in the contract's fields: trees written in this version's code.
        "fingerprint": ops.fingerprint,
    }
    made = dataclasses.asdict(header) | header.versions
    wrong = [
        f"{name} {made[name]}, here {value}" for name, value in here.items() if made[name] != value
    ]
    pairs = enumerate(itertools.zip_longest(header.weights, _weights(leaves)))
    differing = next((f"weight {i} {a}, here {b}" for i, (a, b) in pairs if a != b), None)
    wrong += [differing] if differing else []
    if wrong:
        raise ValueError(f"{path} was made for something else: {'; '.join(wrong)}")
    return Generate(header, jax_export.deserialize(bytearray(program)), leaves)
