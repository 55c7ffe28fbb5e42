"""The ops a model is written in: validation and dispatch; the arithmetic is in pallas_kernels.

`Ops` binds a contract and an implementation. Models call its methods and nothing else that
sums, compares or exponentiates, so one model code runs on every implementation, plain XLA
included.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from jdet.contract import Contract
from jdet.ops.checks import (
    check_attention,
    check_expert_norm,
    check_expert_sum,
    check_gated_matmul,
    check_grouped_gated_matmul,
    check_grouped_matmul,
    check_matmul,
    check_qkv_heads,
    check_rms_norm,
    check_rope,
    check_route,
    check_scores,
)
from jdet.pallas_kernels import OPS, implementation_of
from jdet.pallas_kernels.gated_matmul import Activation
from jdet.pallas_kernels.generations import OPERANDS, generation_of
from jdet.pallas_kernels.log_normalizer import LogNormalizer
from jdet.pallas_kernels.route import Routing

# Each op is a jit of its own: a model of 36 layers traces and lowers a shape once.
_STATIC = {
    "embed": ("scale",),
    "expert_norm": ("eps",),
    "gated_matmul": ("activation",),
    "grouped_matmul": ("leaves", "out_dtype"),
    "matmul": ("leaves", "out_dtype"),
    "qkv_heads": ("eps",),
    "rms_norm": ("eps",),
    "route": ("k", "normalise"),
    "soft_cap": ("cap",),
    "attention": ("scale", "kv_split", "sliding_window", "soft_cap"),
}


@functools.cache
def _op(name: str, implementation: str) -> Callable[..., Any]:
    return jax.jit(implementation_of(name, implementation), static_argnames=_STATIC.get(name, ()))


def _planned(tiles: Array | None) -> dict[str, Array]:
    """The tiles, for an implementation that has made some: the others take none."""
    return {} if tiles is None else {"tiles": tiles}


# Compute capability of the cards that the Mosaic GPU kernels are made for and proven on.
_HOPPER = "9.0"


def default_implementation(device: Any = None, dtype: DTypeLike = jnp.bfloat16) -> str:
    """The invariant implementation for `device` (the default one) and a model's dtype.

    `mosaic_gpu` for 16-bit models on Hopper cards (H100, H200); `mosaic_tpu` for bfloat16 and
    float32 on the TPUs it is compiled for (`pallas_kernels.generations`); `portable` elsewhere.

    Raises:
      NotImplementedError: on another TPU.
    """
    device = device or jax.devices()[0]
    if device.platform == "tpu":
        generation_of(device)
        return "mosaic_tpu" if jnp.dtype(dtype) in OPERANDS else "portable"
    hopper = device.platform == "gpu" and device.compute_capability == _HOPPER
    return "mosaic_gpu" if hopper and jnp.dtype(dtype).itemsize == 2 else "portable"


@dataclasses.dataclass(frozen=True)
class Ops:
    """The ops of one implementation under one contract. Hashable: a static jit argument.

    Attributes:
      implementation: a name of `pallas_kernels.IMPLEMENTATIONS`; not each covers every op.
      contract: the trees.

    Raises:
      ValueError: unknown implementation.
      NotImplementedError: a known one that does not cover every op yet.
    """

    implementation: str = "portable"
    contract: Contract = Contract()

    def __post_init__(self) -> None:
        for name in OPS:
            _op(name, self.implementation)

    @property
    def fingerprint(self) -> str:
        """Of the contract as this implementation keeps it."""
        return self.contract.fingerprint(self.implementation)

    def embed(
        self,
        tokens: Int32[Array, "*rows"],
        table: Float[Array, "V D"],
        *,
        scale: float | None = None,
    ) -> Float[Array, "*rows D"]:
        """Rows of `table`, times `scale` rounded to its dtype; a token outside it gives NaN."""
        return _op("embed", self.implementation)(tokens, table, scale=scale)

    def matmul(
        self,
        x: Float[Array, "*rows K"],
        w: Float[Array, "N K"],
        *,
        bias: Float[Array, " N"] | None = None,
        k_sharded: bool = False,
        out_dtype: DTypeLike | None = None,
    ) -> Float[Array, "*rows N"]:
        """x @ w.T + bias, rounded once to `out_dtype` (x's dtype).

        Accumulated in float32 over ascending K; where `k_sharded`, in the contract's
        `leaves` parts (`pallas_kernels.matmul.reference` writes the tree down).
        """
        leaves = self.contract.leaves if k_sharded else 1
        check_matmul(x, w, bias, leaves)
        y = _op("matmul", self.implementation)(
            x.reshape(-1, x.shape[-1]), w, bias=bias, leaves=leaves, out_dtype=out_dtype
        )
        return y.reshape(*x.shape[:-1], w.shape[0])

    def gated_matmul(
        self,
        x: Float[Array, "*rows K"],
        w: Float[Array, "two_f K"],
        *,
        activation: Activation = "silu",
    ) -> Float[Array, "*rows f"]:
        """activation(x @ gate.T) * (x @ up.T), w the rows of gate and then those of up.

        Both products are `matmul`'s, rounded to x's dtype before the gate
        (`pallas_kernels.gated_matmul.reference`).
        """
        check_gated_matmul(x, w, activation)
        y = _op("gated_matmul", self.implementation)(
            x.reshape(-1, x.shape[-1]), w, activation=activation
        )
        return y.reshape(*x.shape[:-1], w.shape[0] // 2)

    def route(
        self,
        logits: Float32[Array, "M E"],
        routed: Bool[Array, " M"],
        *,
        k: int,
        normalise: bool,
    ) -> Routing:
        """The k experts of each routed token, their weights, and their rows sorted by expert.

        Softmax over the experts in a fixed tree; of equal probabilities the lower index
        (`pallas_kernels.route.reference`). A token's result does not depend on another's.
        """
        check_route(logits, routed, k)
        return _op("route", self.implementation)(logits, routed, k=k, normalise=normalise)

    def grouped_matmul(
        self,
        x: Float[Array, "R K"],
        w: Float[Array, "E N K"],
        sizes: Int32[Array, " E"],
        *,
        tiles: Int32[Array, "T 3"] | None = None,
        k_sharded: bool = False,
        out_dtype: DTypeLike | None = None,
    ) -> Float[Array, "R N"]:
        """x[r] @ w[e].T, e the group of row r: sizes[0] rows of group 0, sizes[1] of 1, ...

        A row has the bits that `matmul` gives it with its expert's weights, whatever the sizes
        are; rows after the last group are zeros (`pallas_kernels.grouped_matmul.reference`).
        `tiles` are those of the `Routing` that has these sizes: they spare the kernels a plan.
        """
        leaves = self.contract.leaves if k_sharded else 1
        check_grouped_matmul(x, w, sizes, leaves)
        return _op("grouped_matmul", self.implementation)(
            x, w, sizes, leaves=leaves, out_dtype=out_dtype, **_planned(tiles)
        )

    def grouped_gated_matmul(
        self,
        x: Float[Array, "M K"],
        w: Float[Array, "E two_f K"],
        sizes: Int32[Array, " E"],
        *,
        tokens: Int32[Array, " R"] | None = None,
        tiles: Int32[Array, "T 3"] | None = None,
    ) -> Float[Array, "R f"]:
        """`gated_matmul` of each row and its group's weights, groups as in `grouped_matmul`.

        With the `tokens` of a `Routing`, row r is x[tokens[r]].
        """
        check_grouped_gated_matmul(x, w, sizes, tokens)
        return _op("grouped_gated_matmul", self.implementation)(
            x, w, sizes, tokens=tokens, **_planned(tiles)
        )

    def expert_sum(self, y: Float[Array, "R D"], routing: Routing) -> Float[Array, "M D"]:
        """What the experts of each token gave (rows as `routing` has them), weighted and added.

        Products rounded to y's dtype, added in float32 in ascending order of experts
        (`pallas_kernels.expert_sum.reference`).
        """
        check_expert_sum(y, routing)
        return _op("expert_sum", self.implementation)(y, routing.weights, routing.places)

    def expert_norm(
        self,
        y: Float[Array, "R D"],
        routing: Routing,
        weight: Float[Array, " D"],
        *,
        eps: float,
        residual: Float[Array, "M D"],
    ) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
        """(norm of s, s) with s = `expert_sum` + residual: the bits of `rms_norm` after it."""
        check_expert_norm(y, routing, weight, residual)
        weights, places = routing.weights, routing.places
        return _op("expert_norm", self.implementation)(
            y, weights, places, weight, residual, eps=eps
        )

    def rms_norm(
        self,
        x: Float[Array, "*rows D"],
        weight: Float[Array, " D"],
        *,
        eps: float,
        residual: Float[Array, "*rows D"] | None = None,
    ) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
        """(norm of s, s) with s = x + residual (`pallas_kernels.rms_norm.reference`)."""
        check_rms_norm(x, weight, residual)
        return _op("rms_norm", self.implementation)(x, weight, eps=eps, residual=residual)

    def rope(
        self,
        x: Float[Array, "B T H D"],
        cos: Float[Array, "P half"],
        sin: Float[Array, "P half"],
        positions: Int32[Array, "B T"],
    ) -> Float[Array, "B T H D"]:
        """Rotary embedding from a table (`pallas_kernels.rope.reference`)."""
        check_rope(x, cos, sin)
        return _op("rope", self.implementation)(x, cos, sin, positions)

    def qkv_heads(
        self,
        qkv: Float[Array, "B T width"],
        q_norm: Float[Array, " D"] | None,
        k_norm: Float[Array, " D"] | None,
        cos: Float32[Array, "B T half"],
        sin: Float32[Array, "B T half"],
        positions: Int32[Array, "B T"],
        k_cache: Float[Array, "P Hkv S D"],
        v_cache: Float[Array, "P Hkv S D"],
        *,
        eps: float,
        page_table: Int32[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "P Hkv S D"], Float[Array, "P Hkv S D"]]:
        """(q, k_cache, v_cache): the heads of a fused projection, normalised and rotated.

        Keys and values go to the slots of their positions, padding (-1) nowhere
        (`pallas_kernels.qkv_heads.reference`).
        """
        check_qkv_heads(qkv, q_norm, k_norm, cos, sin, positions, k_cache, v_cache, page_table)
        return _op("qkv_heads", self.implementation)(
            qkv,
            q_norm,
            k_norm,
            cos,
            sin,
            positions,
            k_cache,
            v_cache,
            eps=eps,
            page_table=page_table,
        )

    def attention(
        self,
        q: Float[Array, "B T H D"],
        k_cache: Float[Array, "P Hkv S D"],
        v_cache: Float[Array, "P Hkv S D"],
        positions: Int32[Array, "B T"],
        *,
        page_table: Int32[Array, "B N"] | None = None,
        scale: float | None = None,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> Float[Array, "B T H D"]:
        """Causal attention of queries at `positions` over their row's cache.

        Scores are multiplied by `scale` (D**-0.5). With a `sliding_window` a query sees so many
        keys at most, its own among them. With a `soft_cap` c its scores are c * tanh(score / c).

        Splits of the contract's `kv_split` at absolute positions, merged in ascending order
        (`pallas_kernels.attention.reference` writes the tree down). The caches hold a row for
        each row of q; or pages, named by `page_table` (`pallas_kernels.attention.pages`), with
        the same bits.
        """
        check_attention(q, k_cache, v_cache, positions, self.contract.kv_split, page_table)
        check_scores(scale, sliding_window, soft_cap)
        return _op("attention", self.implementation)(
            q,
            k_cache,
            v_cache,
            positions,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            kv_split=self.contract.kv_split,
            page_table=page_table,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
        )

    def silu_mul(self, gate_up: Float[Array, "*rows two_f"]) -> Float[Array, "*rows f"]:
        """silu(gate) * up of the two halves of the last axis."""
        return _op("silu_mul", self.implementation)(gate_up)

    def gelu_mul(self, gate_up: Float[Array, "*rows two_f"]) -> Float[Array, "*rows f"]:
        """gelu(gate) * up of the two halves of the last axis, GELU in its tanh form."""
        return _op("gelu_mul", self.implementation)(gate_up)

    def soft_cap(self, x: Float[Array, "*rows V"], cap: float) -> Float[Array, "*rows V"]:
        """cap * tanh(x / cap)."""
        return _op("soft_cap", self.implementation)(x, cap=cap)

    def log_normalizer(self, logits: Float[Array, "*rows V"]) -> LogNormalizer:
        """What turns logits into log-probabilities, in float32, and the argmax of each row."""
        return _op("log_normalizer", self.implementation)(logits.astype(jnp.float32))

    def log_softmax(self, logits: Float[Array, "*rows V"]) -> Float32[Array, "*rows V"]:
        """Log-probabilities over the whole vocabulary, in float32."""
        logits = logits.astype(jnp.float32)
        return self.log_normalizer(logits).log_probs(logits)
