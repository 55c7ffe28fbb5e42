"""Checkpoint map: from Hugging Face tensor names to the decoder's parameters."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.typing import DTypeLike

from jdet.models.config import DecoderConfig


@runtime_checkable
class TensorSource(Protocol):
    """A tensor that has not been read yet (`jdet.io.checkpoint.TensorSource`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, dtype: Any) -> np.ndarray: ...


# A parameter of the decoder, as a path into its state, and the tensors that are stacked,
# along their first axis, to make it.
type Entry = tuple[tuple[str | int, ...], tuple[str, ...]]


def entries(config: DecoderConfig) -> Iterator[Entry]:
    """Every parameter of the decoder with its tensors, in the order they are read."""
    yield ("embedding",), ("model.embed_tokens.weight",)
    for i in range(config.num_hidden_layers):
        hf = f"model.layers.{i}."
        attention, mlp = hf + "self_attn.", hf + "mlp."
        at: tuple[str | int, ...] = ("layers", i)
        yield (*at, "attention_norm"), (hf + "input_layernorm.weight",)
        yield (
            (*at, "attention", "qkv"),
            tuple(f"{attention}{name}_proj.weight" for name in "qkv"),
        )
        if config.qk_norm:
            yield (*at, "attention", "q_norm"), (attention + "q_norm.weight",)
            yield (*at, "attention", "k_norm"), (attention + "k_norm.weight",)
        yield (*at, "attention", "out"), (attention + "o_proj.weight",)
        yield (*at, "mlp_norm"), (hf + "post_attention_layernorm.weight",)
        yield (*at, "mlp", "gate_up"), (mlp + "gate_proj.weight", mlp + "up_proj.weight")
        yield (*at, "mlp", "down"), (mlp + "down_proj.weight",)
    yield ("norm",), ("model.norm.weight",)
    if not config.tie_word_embeddings:
        yield ("lm_head",), ("lm_head.weight",)


def check_tensors(
    config: DecoderConfig,
    tensors: Mapping[str, TensorSource],
    shape_of: Callable[[tuple[str | int, ...]], tuple[int, ...]],
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
        shapes = [tuple(tensors[n].shape) for n in names]
        stacked = (sum(s[0] for s in shapes), *shapes[0][1:])
        if any(s[1:] != shapes[0][1:] for s in shapes) or stacked != shape_of(path):
            problems.append(f"{' + '.join(names)}: {shapes}, expected {shape_of(path)}")
    # A tied checkpoint may still store its head; rotary frequencies are derived.
    known = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = [n for n in tensors if n not in wanted | known and "rotary_emb" not in n]
    problems += [f"unexpected {n}" for n in extra]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"{source} does not fit its config: {shown}")


def read_parameter(
    tensors: Mapping[str, TensorSource], names: tuple[str, ...], dtype: DTypeLike
) -> np.ndarray:
    """The tensors of one parameter, stacked."""
    parts = [tensors[n].read(dtype) for n in names]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)
