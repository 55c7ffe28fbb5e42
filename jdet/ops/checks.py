"""Shape checks of the ops: an error that names both sides, before anything is traced."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jdet.pallas_kernels.attention.pages import check_pages
from jdet.pallas_kernels.gated_matmul import ACTIVATIONS
from jdet.pallas_kernels.route import Routing


def check_matmul(x: Array, w: Array, bias: Array | None, leaves: int) -> None:
    """Raise ValueError unless x[..., K], w[N, K], bias[N] fit and `leaves` divides K."""
    if w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"matmul: x {x.shape} and w {w.shape}; w must be [N, K={x.shape[-1]}]")
    if x.dtype != w.dtype:
        raise ValueError(f"matmul: x is {x.dtype} and w is {w.dtype}; they must be the same")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"matmul: bias {bias.shape}; must be {w.shape[:1]}")
    if w.shape[1] % leaves:
        raise ValueError(f"matmul: K={w.shape[1]} cannot be cut into {leaves} equal leaves")


def check_gated_matmul(x: Array, w: Array, activation: str = "silu") -> None:
    """Raise ValueError unless x[..., K] and w[2 F, K] fit and the activation is known."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"gated_matmul: activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}"
        )
    if w.ndim != 2 or x.shape[-1] != w.shape[1] or w.shape[0] % 2:
        raise ValueError(
            f"gated_matmul: x {x.shape} and w {w.shape}; w must be [2 F, K={x.shape[-1]}]"
        )
    if x.dtype != w.dtype:
        raise ValueError(f"gated_matmul: x is {x.dtype} and w is {w.dtype}; they must be the same")


def _check_groups(op: str, x: Array, w: Array, sizes: Array, rows: str) -> None:
    if w.ndim != 3 or x.ndim != 2 or x.shape[1] != w.shape[2]:
        raise ValueError(
            f"{op}: x {x.shape} and w {w.shape}; must be [R, K] and [E, {rows}, K] of one K"
        )
    if x.dtype != w.dtype:
        raise ValueError(f"{op}: x is {x.dtype} and w is {w.dtype}; they must be the same")
    if sizes.shape != w.shape[:1] or sizes.dtype != jnp.int32:
        raise ValueError(f"{op}: sizes {sizes.dtype}{sizes.shape}; must be int32{w.shape[:1]}")


def check_grouped_matmul(x: Array, w: Array, sizes: Array, leaves: int) -> None:
    """Raise ValueError unless x[R, K], w[E, N, K], sizes[E] fit and `leaves` divides K."""
    _check_groups("grouped_matmul", x, w, sizes, "N")
    if w.shape[2] % leaves:
        raise ValueError(f"grouped_matmul: K={w.shape[2]} cannot be cut into {leaves} equal leaves")


def check_grouped_gated_matmul(
    x: Array, w: Array, sizes: Array, tokens: Array | None = None
) -> None:
    """Raise ValueError unless x[R, K], or x[M, K] and tokens[R], w[E, 2 F, K] and sizes[E] fit."""
    _check_groups("grouped_gated_matmul", x, w, sizes, "2 F")
    if tokens is not None and (tokens.ndim != 1 or tokens.dtype != jnp.int32):
        raise ValueError(f"grouped_gated_matmul: tokens {tokens.dtype}{tokens.shape}; int32[R]")
    if w.shape[1] % 2:
        raise ValueError(f"grouped_gated_matmul: w {w.shape}; must be [E, 2 F, K]")


def check_route(logits: Array, routed: Array, k: int) -> None:
    """Raise ValueError unless there are k experts, and the rows can be numbered in 31 bits."""
    if logits.ndim != 2 or routed.shape != logits.shape[:1]:
        raise ValueError(f"route: logits {logits.shape} and routed {routed.shape}; [M, E] and [M]")
    tokens, experts = logits.shape
    if not 1 <= k <= experts:
        raise ValueError(f"route: k={k} of {experts} experts; allowed: 1 to {experts}")
    if tokens * k * (experts + 1) >= 2**31:
        raise ValueError(
            f"route: {tokens} tokens of {k} experts; at most 2**31 / {experts + 1} rows"
        )


def check_expert_sum(y: Array, routing: Routing) -> None:
    """Raise ValueError unless y has a row for each of the routing's."""
    if y.ndim != 2 or y.shape[:1] != routing.tokens.shape:
        raise ValueError(f"expert_sum: y {y.shape}; must be [R={routing.tokens.shape[0]}, D]")


def check_expert_norm(y: Array, routing: Routing, weight: Array, residual: Array) -> None:
    """Raise ValueError unless y has a row for each of the routing's, residual one a token."""
    if y.ndim != 2 or y.shape[:1] != routing.tokens.shape:
        raise ValueError(f"expert_norm: y {y.shape}; must be [R={routing.tokens.shape[0]}, D]")
    shape = (routing.places.shape[0], y.shape[1])
    if weight.shape != shape[1:] or (residual.shape, residual.dtype) != (shape, y.dtype):
        raise ValueError(
            f"expert_norm: weight {weight.shape} and residual {residual.dtype}{residual.shape};"
            f" must be {shape[1:]} and {y.dtype}{shape}"
        )


def check_rms_norm(x: Array, weight: Array, residual: Array | None) -> None:
    """Raise ValueError unless weight is x's last axis and residual is shaped as x."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: x {x.shape} and weight {weight.shape}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"rms_norm: x {x.shape} {x.dtype} and residual {residual.shape} {residual.dtype}"
        )


def check_rope(x: Array, cos: Array, sin: Array) -> None:
    """Raise ValueError unless the tables hold half of x's head dimension."""
    if x.shape[-1] % 2 or cos.shape != sin.shape or cos.shape[-1] * 2 != x.shape[-1]:
        raise ValueError(f"rope: x {x.shape}, cos {cos.shape}, sin {sin.shape}")


def check_qkv_heads(
    qkv: Array,
    q_norm: Array | None,
    k_norm: Array | None,
    cos: Array,
    sin: Array,
    positions: Array,
    k: Array,
    v: Array,
    page_table: Array | None,
) -> None:
    """Raise ValueError unless the projection, the norms, the angles and the caches fit."""
    rows = qkv.shape[:2]
    _, kv_heads, _, dim = k.shape
    if k.shape != v.shape or not qkv.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"qkv_heads: k_cache {k.shape} {k.dtype}, v_cache {v.shape} {v.dtype};"
            f" must be alike, and of qkv's {qkv.dtype}"
        )
    heads, rest = divmod(qkv.shape[2], dim)
    if rest or heads <= 2 * kv_heads:
        raise ValueError(
            f"qkv_heads: qkv {qkv.shape} and k_cache {k.shape}; qkv must hold query heads of {dim},"
            f" then {kv_heads} of keys and {kv_heads} of values"
        )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (dim,):
            raise ValueError(f"qkv_heads: {name} {weight.shape}; must be {(dim,)}")
    if dim % 2 or not cos.shape == sin.shape == (*rows, dim // 2):
        raise ValueError(
            f"qkv_heads: cos {cos.shape}, sin {sin.shape}; must be {(*rows, dim // 2)}"
        )
    if positions.shape != rows:
        raise ValueError(f"qkv_heads: positions {positions.shape}; must be {rows}")
    if page_table is None and k.shape[0] != rows[0]:
        raise ValueError(f"qkv_heads: a cache of {k.shape[0]} rows for {rows[0]} rows of qkv")
    if page_table is not None and page_table.shape[0] != rows[0]:
        raise ValueError(f"qkv_heads: page_table {page_table.shape} for {rows[0]} rows of qkv")


def check_attention(
    q: Array, k: Array, v: Array, positions: Array, kv_split: int, page_table: Array | None = None
) -> None:
    """Raise ValueError unless queries, cache and positions fit and kv_split divides S.

    With a page table: unless it fits the queries, and the size of a page fits kv_split.
    """
    rows = k.shape[0] if page_table is None else q.shape[0]
    if k.shape != v.shape or q.shape[0] != rows or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q {q.shape}, k_cache {k.shape}, v_cache {v.shape}")
    if q.shape[2] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[2]} query heads over {k.shape[1]} key heads")
    if positions.shape != q.shape[:2]:
        raise ValueError(f"attention: positions {positions.shape}; must be {q.shape[:2]}")
    if page_table is not None:
        check_pages(page_table, q.shape[0], k.shape[2], kv_split)
    elif k.shape[2] % kv_split:
        raise ValueError(
            f"attention: a cache of {k.shape[2]} slots is no multiple of kv_split={kv_split}"
        )


def check_scores(scale: Any, sliding_window: Any, soft_cap: Any) -> None:
    """Raise ValueError unless the options of attention are numbers in their ranges, or None."""
    for name, value in (("scale", scale), ("soft_cap", soft_cap)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value > 0):
            raise ValueError(f"attention: {name}={value!r}; must be a positive number, or None")
    whole = isinstance(sliding_window, int) and not isinstance(sliding_window, bool)
    if sliding_window is not None and not (whole and sliding_window >= 1):
        raise ValueError(
            f"attention: sliding_window={sliding_window!r}; must be an int of 1 or more, or None"
        )
