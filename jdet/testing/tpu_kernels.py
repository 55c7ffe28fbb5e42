"""Calls of the TPU kernels at real models' shapes, to be compiled for a TPU."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jdet.pallas_kernels import implementation_of


@dataclasses.dataclass(frozen=True)
class Widths:
    """What of a dense model decides its kernels' shapes."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    qk_norm: bool


MODELS = {
    "qwen3-8b": Widths(4096, 12288, 32, 8, 128, 151936, True),
    "smollm2-135m": Widths(576, 1536, 9, 3, 64, 49152, False),
}
# Tokens of a step: decode of 1, 8 and 64 rows; a prefill of one.
STEPS = (1, 8, 64, 8192)
_KV_SPLIT = 256


def _shape(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _op(name: str, **options: Any) -> Callable[..., Any]:
    return functools.partial(implementation_of(name, "mosaic_tpu"), **options)


def kernel_calls(
    model: str, tokens: int, *, page_size: int | None = None, context: int = 2048
) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """(op, function, shapes of its arguments) of each kernel of one step in bfloat16.

    A step of up to 64 tokens is a decode of so many rows over caches of `context` slots, or
    pages of `page_size`; a longer one is a prefill of one row.
    """
    w = MODELS[model]
    batch, length = (tokens, 1) if tokens <= 64 else (1, tokens)
    context = max(context, length)
    width = (w.heads + 2 * w.kv_heads) * w.dim
    rows = _shape(tokens, w.hidden)
    for n, k in ((width, w.hidden), (w.hidden, w.heads * w.dim), (w.hidden, w.inner)):
        yield "matmul", _op("matmul"), (_shape(tokens, k), _shape(n, k))
    yield "gated_matmul", _op("gated_matmul"), (rows, _shape(2 * w.inner, w.hidden))
    norm = _op("rms_norm", eps=1e-6)
    yield "rms_norm", lambda x, s, r: norm(x, s, residual=r), (rows, _shape(w.hidden), rows)
    if tokens == batch:
        logits = _shape(tokens, w.vocabulary, dtype=jnp.float32)
        head = _op("matmul", out_dtype=jnp.float32)
        yield "matmul", head, (rows, _shape(w.vocabulary, w.hidden))
        yield "log_normalizer", _op("log_normalizer"), (logits,)

    positions = _shape(batch, length, dtype=jnp.int32)
    angles = _shape(batch, length, w.dim // 2, dtype=jnp.float32)
    head_norm = _shape(w.dim) if w.qk_norm else None
    pages = None if page_size is None else batch * context // page_size
    cache = _shape(pages or batch, w.kv_heads, page_size or context, w.dim)
    table = None
    if page_size is not None:
        table = _shape(batch, context // page_size, dtype=jnp.int32)
    heads = _op("qkv_heads", eps=1e-6)
    yield (
        "qkv_heads",
        lambda *args: heads(*args[:-1], page_table=args[-1]),
        (
            _shape(batch, length, width),
            head_norm,
            head_norm,
            angles,
            angles,
            positions,
            cache,
            cache,
            table,
        ),
    )
    attend = _op("attention", scale=w.dim**-0.5, kv_split=_KV_SPLIT)
    yield (
        "attention",
        lambda *args: attend(*args[:-1], page_table=args[-1]),
        (_shape(batch, length, w.heads, w.dim), cache, cache, positions, table),
    )


def expert_calls(tokens: int) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """The grouped matmuls of a step of Qwen3-30B-A3B: 128 experts, 8 a token."""
    experts, chosen, hidden, inner = 128, 8, 2048, 768
    sizes = _shape(experts, dtype=jnp.int32)
    rows = tokens * chosen
    gated = (_shape(rows, hidden), _shape(experts, 2 * inner, hidden), sizes)
    yield "grouped_gated_matmul", _op("grouped_gated_matmul"), gated
    down = (_shape(rows, inner), _shape(experts, hidden, inner), sizes)
    yield "grouped_matmul", _op("grouped_matmul"), down
