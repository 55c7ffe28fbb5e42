"""The decoder of the Llama and Qwen3 dense families, in Flax NNX."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jdet.cache import KVCache
from jdet.decoding import Group
from jdet.models.config import DecoderConfig
from jdet.ops import Ops


class RopeTable(nnx.Variable):
    """Cosines or sines by position: derived from the config, no weight."""


def rope_table(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of every position and frequency, [P, D/2], float32 from float64."""
    half = config.head_dim // 2
    inverse = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    angle = np.arange(config.max_position_embeddings, dtype=np.float64)[:, None] * inverse
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _weight(rngs: nnx.Rngs, shape: tuple[int, int], dtype: DTypeLike) -> nnx.Param:
    """Random weights [out, in] that keep the variance of their input."""
    return nnx.Param((rngs.params.normal(shape, jnp.float32) * shape[1] ** -0.5).astype(dtype))


def _norm(size: int, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.ones(size, dtype))


class Placed(NamedTuple):
    """Where the tokens of a group stand; in the order of groups they are rows of one matrix."""

    positions: Int32[Array, "B T"]
    page_table: Int32[Array, "B N"] | None
    cos: Float32[Array, "B T half"]
    sin: Float32[Array, "B T half"]


def _split(x: Float[Array, "R D"], groups: tuple[Placed, ...]) -> list[Float[Array, "B T D"]]:
    """The rows of each group."""
    ends = np.cumsum([g.positions.size for g in groups])
    parts = jnp.split(x, ends[:-1].tolist())
    return [part.reshape(*g.positions.shape, -1) for part, g in zip(parts, groups, strict=True)]


class Attention(nnx.Module):
    """Grouped-query attention; query, key and value projections are one matrix."""

    def __init__(self, config: DecoderConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        dim, hidden = config.head_dim, config.hidden_size
        self.qkv = _weight(rngs, ((heads + 2 * kv_heads) * dim, hidden), dtype)
        self.out = _weight(rngs, (hidden, heads * dim), dtype)
        self.q_norm = _norm(dim, dtype) if config.qk_norm else None
        self.k_norm = _norm(dim, dtype) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "R D"],
        groups: tuple[Placed, ...],
        cache: tuple[Float[Array, "P N S H"], Float[Array, "P N S H"]],
        ops: Ops,
    ) -> tuple[Float[Array, "R D"], tuple[Array, Array]]:
        k, v = cache
        queries, outputs = [], []
        # The cache holds all new entries before attention reads it: one path for all.
        for group, qkv in zip(groups, _split(ops.matmul(x, self.qkv[...]), groups), strict=True):
            q, k, v = ops.qkv_heads(
                qkv,
                None if self.q_norm is None else self.q_norm[...],
                None if self.k_norm is None else self.k_norm[...],
                group.cos,
                group.sin,
                group.positions,
                k,
                v,
                eps=self.config.rms_norm_eps,
                page_table=group.page_table,
            )
            queries.append(q)
        for group, q in zip(groups, queries, strict=True):
            y = ops.attention(q, k, v, group.positions, page_table=group.page_table)
            outputs.append(y.reshape(group.positions.size, -1))
        return ops.matmul(jnp.concatenate(outputs), self.out[...], k_sharded=True), (k, v)


class MLP(nnx.Module):
    """SiLU-gated MLP; gate and up projections are one matrix."""

    def __init__(self, config: DecoderConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = _weight(rngs, (2 * inner, hidden), dtype)
        self.down = _weight(rngs, (hidden, inner), dtype)

    def __call__(self, x: Float[Array, "R D"], ops: Ops) -> Float[Array, "R D"]:
        inner = ops.gated_matmul(x, self.gate_up[...])
        return ops.matmul(inner, self.down[...], k_sharded=True)


class Layer(nnx.Module):
    """Pre-norm transformer layer; each norm also adds the branch before it."""

    def __init__(self, config: DecoderConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.eps = config.rms_norm_eps
        self.attention_norm = _norm(config.hidden_size, dtype)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = _norm(config.hidden_size, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self,
        branch: Float[Array, "R D"],
        residual: Float[Array, "R D"] | None,
        groups: tuple[Placed, ...],
        cache: tuple[Array, Array],
        ops: Ops,
    ) -> tuple[Float[Array, "R D"], Float[Array, "R D"], tuple[Array, Array]]:
        x, residual = ops.rms_norm(
            branch, self.attention_norm[...], eps=self.eps, residual=residual
        )
        branch, cache = self.attention(x, groups, cache, ops)
        x, residual = ops.rms_norm(branch, self.mlp_norm[...], eps=self.eps, residual=residual)
        return self.mlp(x, ops), residual, cache


class Decoder(nnx.Module):
    """Token ids to hidden states and logits. `nnx.Module`s are pytrees: jit takes them.

    Attributes:
      config: the shape.
      dtype: of weights, activations and cache; logits are float32.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embedding = nnx.Param(
            (rngs.params.normal((config.vocab_size, config.hidden_size)) * 0.02).astype(dtype)
        )
        self.layers = nnx.List(
            [Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config.hidden_size, dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else _weight(rngs, (config.vocab_size, config.hidden_size), dtype)
        )
        cos, sin = rope_table(config)
        self.rope_cos, self.rope_sin = RopeTable(jnp.asarray(cos)), RopeTable(jnp.asarray(sin))

    def __call__(
        self, groups: tuple[Group, ...], cache: KVCache, ops: Ops
    ) -> tuple[tuple[Float[Array, "B T D"], ...], KVCache]:
        """Read the tokens of all groups: each weight is read once, attention runs by group.

        Returns the normalised hidden states of each group and the cache with the tokens' keys
        and values in their slots; padding writes nothing.
        """
        placed = tuple(self._placed(group) for group in groups)
        tokens = jnp.concatenate([group.tokens.reshape(-1) for group in groups])
        branch, residual = ops.embed(tokens, self.embedding[...]), None
        k, v = list(cache.k), list(cache.v)
        for i, layer in enumerate(self.layers):
            branch, residual, (k[i], v[i]) = layer(branch, residual, placed, (k[i], v[i]), ops)
        hidden, _ = ops.rms_norm(
            branch, self.norm[...], eps=self.config.rms_norm_eps, residual=residual
        )
        return tuple(_split(hidden, placed)), KVCache(tuple(k), tuple(v))

    def _placed(self, group: Group) -> Placed:
        at = jnp.maximum(group.positions, 0)  # what padding reads is not used
        return Placed(
            group.positions, group.page_table, self.rope_cos[...][at], self.rope_sin[...][at]
        )

    def logits(self, hidden: Float[Array, "*rows D"], ops: Ops) -> Float32[Array, "*rows V"]:
        """Logits of normalised hidden states, float32, not rounded to the model's dtype."""
        head = self.embedding if self.lm_head is None else self.lm_head
        return ops.matmul(hidden, head[...], out_dtype=jnp.float32)
