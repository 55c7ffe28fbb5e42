"""From a checkpoint's tensors to the decoder's parameters: which, and whether they fit."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jdet.io.converted import Stored
from jdet.models.config import DecoderConfig
from jdet.models.families import FAMILIES


@runtime_checkable
class TensorSource(Protocol):
    """A tensor that has not been read yet (`jdet.io.checkpoint.TensorSource`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, dtype: Any) -> np.ndarray: ...


# A parameter of the decoder, as a path into its state, and the tensors that are stacked,
# along their first axis, to make it.
type Path = tuple[str | int, ...]
type Entry = tuple[Path, tuple[str, ...]]


def entries(config: DecoderConfig) -> Iterator[Entry]:
    """Every parameter of the decoder with its tensors, in the order they are read."""
    has = {
        "qkv_bias": config.qkv_bias,
        "out_bias": config.out_bias,
        "q_norm": config.qk_norm,
        "k_norm": config.qk_norm,
        "attention_post_norm": config.post_norms,
        "mlp_post_norm": config.post_norms,
        "lm_head": not config.tie_word_embeddings,
    }
    for parameter, names in FAMILIES[config.family].tensors.items():
        if not has.get(parameter.rpartition(".")[2], True):
            continue
        for i in range(config.num_hidden_layers if "{}" in parameter else 1):
            if config.has_experts(i) and ".mlp." in parameter:
                continue
            if not config.has_experts(i) and ".experts." in parameter:
                continue
            path = parameter.format(i).split(".")
            experts = range(config.num_experts if names[0].count("{}") == 2 else 1)
            yield (
                tuple(int(part) if part.isdigit() else part for part in path),
                tuple(name.format(i, expert) for expert in experts for name in names),
            )


def named_as_mapped[T: TensorSource](
    config: DecoderConfig, tensors: Mapping[str, T]
) -> dict[str, T]:
    """The tensors under the names of the family's map, without the parts that are not read."""
    rename = FAMILIES[config.family].rename
    return {ours: source for name, source in tensors.items() if (ours := rename(name)) is not None}


def check_tensors(
    config: DecoderConfig,
    tensors: Mapping[str, TensorSource],
    shape_of: Callable[[Path], tuple[int, ...]],
    source: str,
) -> None:
    """Compare names and shapes with what the config asks for, before anything is read.

    Raises:
      ValueError: everything that is missing, unexpected or of another shape, together.
    """
    problems, wanted = [], set()
    for path, names in entries(config):
        wanted.update(names)
        missing = [n for n in names if n not in tensors]
        problems += [f"missing {n}" for n in missing]
        if missing:
            continue
        shapes, expected = [tuple(tensors[n].shape) for n in names], shape_of(path)
        if len(expected) == 3:  # of every expert equally many tensors, all alike
            part = (math.prod(expected[:2]) // len(names), expected[2])
            problems += [
                f"{n}: {s}, expected {part}"
                for n, s in zip(names, shapes, strict=True)
                if s != part
            ]
            continue
        stacked = (sum(s[0] for s in shapes), *shapes[0][1:])
        if any(s[1:] != shapes[0][1:] for s in shapes) or stacked != expected:
            problems.append(f"{' + '.join(names)}: {shapes}, expected {expected}")
    # A tied checkpoint may still store its head; rotary frequencies are derived.
    known = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = [n for n in tensors if n not in wanted | known and "rotary_emb" not in n]
    _refuse(source, [*problems, *(f"unexpected {n}" for n in extra)])


def check_parameters(
    stored: Mapping[str, Stored], wanted: Mapping[str, jax.ShapeDtypeStruct], source: str
) -> None:
    """`check_tensors` for a converted folder, which holds the decoder's own parameters.

    Raises:
      ValueError: also where one would have to be widened: the model that was converted may hold
        more than its rounded values.
    """
    problems = [f"missing {n}" for n in wanted if n not in stored]
    problems += [
        f"{n}: {stored[n].shape}, expected {w.shape}"
        for n, w in wanted.items()
        if n in stored and stored[n].shape != w.shape
    ]
    _refuse(source, [*problems, *(f"unexpected {n}" for n in stored if n not in wanted)])
    for name, want in wanted.items():
        if jnp.dtype(stored[name].dtype).itemsize < want.dtype.itemsize:
            raise ValueError(
                f"{source} was converted to {stored[name].dtype}; {want.dtype} needs the original,"
                " or a conversion to that"
            )


def name_of(path: Path) -> str:
    """A parameter's path as a name: "layers.0.attention.qkv"."""
    return ".".join(map(str, path))


def _refuse(source: str, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"{source} does not fit its config: {shown}")


def read_parameter(
    config: DecoderConfig,
    path: Path,
    tensors: Mapping[str, TensorSource],
    names: tuple[str, ...],
    dtype: DTypeLike,
) -> np.ndarray:
    """The tensors of one parameter, stacked, in `dtype`; a norm's whole weight.

    Those of experts still lie one below the other: [E N, K].
    """
    parts = [tensors[n].read(dtype) for n in names]
    value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)
    if config.unit_offset_norms and str(path[-1]).endswith("norm"):
        return value + np.ones((), value.dtype)
    return value
