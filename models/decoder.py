"""The decoder of all families, in Flax NNX: one, told apart by its config."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jdet.cache import KVCache
from jdet.decoding import Group
from jdet.models.config import DecoderConfig
from jdet.models.moe import ExpertRows, Experts
from jdet.models.weights import ones, random_weight
from jdet.ops import Ops
from jdet.pallas_kernels.gated_matmul import Activation


class RopeTable(nnx.Variable):
    """Cosines or sines by position: derived from the config, no weight."""


def rope_tables(config: DecoderConfig) -> dict[tuple[str, int], np.ndarray]:
    """The values of the decoder's `RopeTable`s, by their paths: [P, D/2], float32 from float64."""
    tables = {}
    for i, rope in enumerate(config.ropes):
        cos, sin = rope.table(config.head_dim, config.max_position_embeddings)
        tables |= {("rope_cos", i): cos, ("rope_sin", i): sin}
    return tables


def _norm(config: DecoderConfig, size: int, dtype: DTypeLike, rngs: nnx.Rngs | None) -> nnx.Param:
    return ones(rngs, size, jnp.float32 if config.unit_offset_norms else dtype)


def _bias(rngs: nnx.Rngs | None, size: int, dtype: DTypeLike) -> nnx.Param:
    return random_weight(rngs, (size,), dtype, scale=0.1)


def _value(parameter: nnx.Param | None) -> Array | None:
    """The array of a parameter that not every family has."""
    return None if parameter is None else parameter[...]


class Placed(NamedTuple):
    """Where the tokens of a group stand; in the order of groups they are rows of one matrix."""

    positions: Int32[Array, "B T"]
    page_table: Int32[Array, "B N"] | None
    cos: tuple[Float32[Array, "B T half"], ...]  # by rope of the config
    sin: tuple[Float32[Array, "B T half"], ...]


def _norm_of_sum(
    branch: Float[Array, "R D"] | ExpertRows,
    norm: nnx.Param,
    residual: Float[Array, "R D"] | None,
    eps: float,
    ops: Ops,
) -> tuple[Float[Array, "R D"], Float[Array, "R D"]]:
    """(norm of s, s) with s = branch + residual."""
    if isinstance(branch, ExpertRows):
        assert residual is not None, "a mixture follows attention, which has left one"
        return ops.expert_norm(*branch, norm[...], eps=eps, residual=residual)
    return ops.rms_norm(branch, norm[...], eps=eps, residual=residual)


def _split(x: Float[Array, "R D"], groups: tuple[Placed, ...]) -> list[Float[Array, "B T D"]]:
    """The rows of each group."""
    ends = np.cumsum([g.positions.size for g in groups])
    parts = jnp.split(x, ends[:-1].tolist())
    return [part.reshape(*g.positions.shape, -1) for part, g in zip(parts, groups, strict=True)]


class Attention(nnx.Module):
    """Grouped-query attention of one layer; query, key and value projections are one matrix."""

    def __init__(self, config: DecoderConfig, layer: int, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.config = config
        self.window = config.window(layer)
        self.rope_index = config.rope_index(layer)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        dim, hidden = config.head_dim, config.hidden_size
        width = (heads + 2 * kv_heads) * dim
        self.qkv = random_weight(rngs, (width, hidden), dtype)
        self.qkv_bias = _bias(rngs, width, dtype) if config.qkv_bias else None
        self.out = random_weight(rngs, (hidden, heads * dim), dtype)
        self.out_bias = _bias(rngs, hidden, dtype) if config.out_bias else None
        self.q_norm = _norm(config, dim, dtype, rngs) if config.qk_norm else None
        self.k_norm = _norm(config, dim, dtype, rngs) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "R D"],
        groups: tuple[Placed, ...],
        cache: tuple[Float[Array, "P N S H"], Float[Array, "P N S H"]],
        ops: Ops,
    ) -> tuple[Float[Array, "R D"], tuple[Array, Array]]:
        k, v = cache
        projected = ops.matmul(x, self.qkv[...], bias=_value(self.qkv_bias))
        queries, outputs = [], []
        # The cache holds all new entries before attention reads it: one path for all.
        for group, qkv in zip(groups, _split(projected, groups), strict=True):
            q, k, v = ops.qkv_heads(
                qkv,
                _value(self.q_norm),
                _value(self.k_norm),
                group.cos[self.rope_index],
                group.sin[self.rope_index],
                group.positions,
                k,
                v,
                eps=self.config.rms_norm_eps,
                page_table=group.page_table,
            )
            queries.append(q)
        for group, q in zip(groups, queries, strict=True):
            y = ops.attention(
                q,
                k,
                v,
                group.positions,
                page_table=group.page_table,
                scale=self.config.attention_scale,
                sliding_window=self.window,
            )
            outputs.append(y.reshape(group.positions.size, -1))
        y = ops.matmul(
            jnp.concatenate(outputs), self.out[...], bias=_value(self.out_bias), k_sharded=True
        )
        return y, (k, v)


class MLP(nnx.Module):
    """Gated MLP; gate and up projections are one matrix."""

    def __init__(self, config: DecoderConfig, dtype: DTypeLike, rngs: nnx.Rngs | None):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation: Activation = config.activation
        self.gate_up = random_weight(rngs, (2 * inner, hidden), dtype)
        self.down = random_weight(rngs, (hidden, inner), dtype)

    def __call__(self, x: Float[Array, "R D"], ops: Ops) -> Float[Array, "R D"]:
        inner = ops.gated_matmul(x, self.gate_up[...], activation=self.activation)
        return ops.matmul(inner, self.down[...], k_sharded=True)


class Layer(nnx.Module):
    """Pre-norm transformer layer; each norm also adds the branch before it.

    With post-norms the branch is normalised before it is added.
    """

    def __init__(self, config: DecoderConfig, layer: int, dtype: DTypeLike, rngs: nnx.Rngs | None):
        hidden, post = config.hidden_size, config.post_norms
        self.eps = config.rms_norm_eps
        self.attention_norm = _norm(config, hidden, dtype, rngs)
        self.attention = Attention(config, layer, dtype, rngs)
        self.attention_post_norm = _norm(config, hidden, dtype, rngs) if post else None
        self.mlp_norm = _norm(config, hidden, dtype, rngs)
        sparse = config.has_experts(layer)
        self.mlp = None if sparse else MLP(config, dtype, rngs)
        self.experts = Experts(config, dtype, rngs) if sparse else None
        self.mlp_post_norm = _norm(config, hidden, dtype, rngs) if post else None

    def __call__(
        self,
        branch: Float[Array, "R D"] | ExpertRows,
        residual: Float[Array, "R D"] | None,
        groups: tuple[Placed, ...],
        cache: tuple[Array, Array],
        ops: Ops,
    ) -> tuple[Float[Array, "R D"] | ExpertRows, Float[Array, "R D"], tuple[Array, Array]]:
        x, residual = _norm_of_sum(branch, self.attention_norm, residual, self.eps, ops)
        branch, cache = self.attention(x, groups, cache, ops)
        branch = self._after(branch, self.attention_post_norm, ops)
        x, residual = ops.rms_norm(branch, self.mlp_norm[...], eps=self.eps, residual=residual)
        if self.mlp is not None:
            branch = self.mlp(x, ops)
        elif self.experts is not None:
            real = jnp.concatenate([group.positions.reshape(-1) >= 0 for group in groups])
            if self.mlp_post_norm is None:
                return self.experts.rows(x, real, ops), residual, cache
            branch = self.experts(x, real, ops)
        return self._after(branch, self.mlp_post_norm, ops), residual, cache

    def _after(
        self, branch: Float[Array, "R D"], norm: nnx.Param | None, ops: Ops
    ) -> Float[Array, "R D"]:
        return branch if norm is None else ops.rms_norm(branch, norm[...], eps=self.eps)[0]


class Decoder(nnx.Module):
    """Token ids to hidden states and logits. `nnx.Module`s are pytrees: jit takes them.

    Attributes:
      config: the shape.
      dtype: of weights, activations and cache; logits are float32.

    Without rngs it is a decoder of shapes and dtypes, to be filled from a file.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        shape = config.vocab_size, config.hidden_size
        self.embedding = random_weight(rngs, shape, dtype, scale=0.02)
        self.layers = nnx.List(
            [Layer(config, i, dtype, rngs) for i in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config, config.hidden_size, dtype, rngs)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else random_weight(rngs, shape, dtype)
        tables = {
            path: RopeTable(
                jax.ShapeDtypeStruct(t.shape, t.dtype) if rngs is None else jnp.asarray(t)
            )
            for path, t in rope_tables(config).items()
        }
        self.rope_cos = nnx.List([t for (name, _), t in tables.items() if name == "rope_cos"])
        self.rope_sin = nnx.List([t for (name, _), t in tables.items() if name == "rope_sin"])

    def __call__(
        self, groups: tuple[Group, ...], cache: KVCache, ops: Ops
    ) -> tuple[tuple[Float[Array, "B T D"], ...], KVCache]:
        """Read the tokens of all groups: each weight is read once, attention runs by group.

        Returns the normalised hidden states of each group and the cache with the tokens' keys
        and values in their slots; padding writes nothing.
        """
        placed = tuple(self._placed(group) for group in groups)
        tokens = jnp.concatenate([group.tokens.reshape(-1) for group in groups])
        scale = self.config.hidden_size**0.5 if self.config.scale_embeddings else None
        branch, residual = ops.embed(tokens, self.embedding[...], scale=scale), None
        k, v = list(cache.k), list(cache.v)
        for i, layer in enumerate(self.layers):
            branch, residual, (k[i], v[i]) = layer(branch, residual, placed, (k[i], v[i]), ops)
        hidden, _ = _norm_of_sum(branch, self.norm, residual, self.config.rms_norm_eps, ops)
        return tuple(_split(hidden, placed)), KVCache(tuple(k), tuple(v))

    def _placed(self, group: Group) -> Placed:
        at = jnp.maximum(group.positions, 0)  # what padding reads is not used
        return Placed(
            group.positions,
            group.page_table,
            tuple(table[...][at] for table in self.rope_cos),
            tuple(table[...][at] for table in self.rope_sin),
        )

    def logits(self, hidden: Float[Array, "*rows D"], ops: Ops) -> Float32[Array, "*rows V"]:
        """Logits of normalised hidden states, float32, not rounded to the model's dtype."""
        head = self.embedding if self.lm_head is None else self.lm_head
        logits = ops.matmul(hidden, head[...], out_dtype=jnp.float32)
        cap = self.config.final_soft_cap
        return logits if cap is None else ops.soft_cap(logits, cap)
