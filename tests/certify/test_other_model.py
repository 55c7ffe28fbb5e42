"""Somebody else's model: attention and an MLP in Flax NNX, with plain jnp and with jdet's ops.

def test_block(assert_batch_invariant):
    assert_batch_invariant(block, (tokens,))
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdet
from jdet.certify import BatchVariance, assert_batch_invariant, audit, bisect

WIDTH, HEADS, LENGTH = 128, 4, 6


class Block(nnx.Module):
    """Attention, an MLP, and a score for the sequence; nothing of it is jdet's."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def linear(n: int, m: int) -> nnx.Linear:
            return nnx.Linear(n, m, use_bias=False, rngs=rngs)

        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.scale = nnx.Param(jnp.ones(WIDTH))

    def product(self, layer: nnx.Linear, x: jax.Array) -> jax.Array:
        return layer(x)

    def norm(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * self.scale[...]

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, WIDTH) to (B, WIDTH)."""
        qkv = self.product(self.qkv, self.norm(x))
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * HEADS, -1), 3, axis=2)
        x = x + self.product(self.out, self.attend(q, k, v).reshape(x.shape))
        last = x[:, -1]
        return last + self.product(self.down, jax.nn.relu(self.product(self.up, self.norm(last))))


class OursInside(Block):
    """The same weights and the same calls, three methods on jdet's ops."""

    ops = jdet.Ops("portable")

    def product(self, layer: nnx.Linear, x: jax.Array) -> jax.Array:
        return self.ops.matmul(x, layer.kernel[...].T)

    def norm(self, x: jax.Array) -> jax.Array:
        return self.ops.rms_norm(x, self.scale[...], eps=1e-6)[0]

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        slots = [(0, 0), (0, 0), (0, -q.shape[1] % self.ops.contract.kv_split), (0, 0)]
        keys, values = (jnp.pad(a.swapaxes(1, 2), slots) for a in (k, v))
        positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
        return self.ops.attention(q, keys, values, positions)


def tokens(rows: int) -> jax.Array:
    drawn = np.random.default_rng(0).standard_normal((rows, LENGTH, WIDTH))
    return jnp.asarray(drawn, jnp.float32)


def test_plain_jnp_fails_and_is_told_where() -> None:
    block = Block(nnx.Rngs(0))
    with pytest.raises(BatchVariance) as caught:
        assert_batch_invariant(block, (tokens(3),), sizes=(8,))
    error = caught.value
    found = bisect(block, error.alone, error.batch, 0, error.row)
    # On one CPU the norm's sum comes first, on another the first product may.
    assert found.kind == "operation", str(found)
    assert found.primitive in ("reduce_sum", "dot_general")
    assert found.source.startswith(__file__)


def test_on_jdet_ops_it_passes() -> None:
    plain, ours = Block(nnx.Rngs(0)), OursInside(nnx.Rngs(0))
    x = tokens(3)
    np.testing.assert_allclose(*jax.jit(lambda x: (plain(x), ours(x)))(x), atol=1e-4)
    assert_batch_invariant(
        ours, (x,), sizes=(8,), compiler_options=jdet.compiler_options("portable")
    )
    seen = audit(
        ours, lambda n: (tokens(n),), (1, 8), compiler_options=jdet.compiler_options("portable")
    )
    assert seen.certified, str(seen)
