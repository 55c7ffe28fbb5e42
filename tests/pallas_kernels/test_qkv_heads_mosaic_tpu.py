"""The heads on TPU, interpreted: the bits of `portable`, whose tree it is, in any block."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.pallas_kernels.qkv_heads import mosaic_tpu

EPS = 1e-5
SIZES = {"odd, of 64": (3, 1, 64), "of 128": (4, 1, 128), "of 256": (2, 1, 256)}


@pytest.fixture(scope="module")
def case(normal):
    """case(size, dtype): all arguments of 2 rows of 20 tokens, the last 3 padding."""

    def draw(size, dtype):
        heads, kv_heads, dim = size
        positions = np.broadcast_to(np.where(np.arange(20) < 17, np.arange(20), -1), (2, 20))
        angle = np.maximum(positions, 0)[..., None] * 1e4 ** (-np.arange(0, dim, 2) / dim)
        arrays = {
            "qkv": normal(0, (2, 20, (heads + 2 * kv_heads) * dim), dtype),
            "q_norm": normal(1, (dim,), dtype),
            "k_norm": normal(2, (dim,), dtype),
            "cos": np.cos(angle).astype(np.float32),
            "sin": np.sin(angle).astype(np.float32),
            "positions": positions.astype(np.int32),
            "k_cache": normal(3, (2, kv_heads, 32, dim), dtype),
            "v_cache": normal(4, (2, kv_heads, 32, dim), dtype),
        }
        return {name: jnp.asarray(x) for name, x in arrays.items()}

    return draw


@pytest.mark.parametrize(
    ("size", "dtype"), tuple(zip(SIZES, ("bfloat16", "float32", "bfloat16"), strict=True))
)
def test_bits_are_those_of_portable(case, op, assert_same_bits, size, dtype):
    args = case(SIZES[size], jnp.dtype(dtype))
    want = op("qkv_heads", "portable")(**args, eps=EPS)
    for block in (None, 16):
        got = mosaic_tpu.qkv_heads(**args, eps=EPS, block_tokens=block, interpret=True)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b, f"blocks of {block}")


def test_decode_is_prefill_without_norms(case, assert_same_bits):
    args = case(SIZES["odd, of 64"], jnp.bfloat16) | {"q_norm": None, "k_norm": None}
    run = functools.partial(mosaic_tpu.qkv_heads, eps=EPS, interpret=True)
    q, k, v = run(**args)
    step = {n: args[n][:, 5:6] for n in ("qkv", "cos", "sin", "positions")}
    q_step, k_step, v_step = run(**args | step)
    assert_same_bits(q_step, q[:, 5:6])
    for got, want in ((k_step, k), (v_step, v)):
        assert_same_bits(got[:, :, 5], want[:, :, 5])


def test_simulated(case, simulated_tpu, assert_same_bits):
    args = case(SIZES["odd, of 64"], jnp.bfloat16)
    run = functools.partial(mosaic_tpu.qkv_heads, **args, eps=EPS)
    got = simulated_tpu(run, block_tokens=16, seed=2)
    for a, b in zip(got, run(interpret=True), strict=True):
        assert_same_bits(a, b)


def test_slots_in_pages(case, normal, op, assert_same_bits):
    """Pages of 16, one of them missing; positions beyond the table write nothing."""
    args = case(SIZES["odd, of 64"], jnp.bfloat16)
    pages = (jnp.asarray(normal(i, (5, 1, 16, 64), jnp.bfloat16)) for i in (5, 6))
    args |= dict(zip(("k_cache", "v_cache"), pages, strict=True))
    args["positions"] = args["positions"].at[0, 3].set(40)
    args["page_table"] = jnp.array([[3, 1], [-1, 4]], jnp.int32)
    want = op("qkv_heads", "portable")(**args, eps=EPS)
    got = mosaic_tpu.qkv_heads(**args, eps=EPS, interpret=True)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert (got[1] != args["k_cache"]).any()


def test_refuses_other_head_sizes(case):
    args = case((2, 1, 64), jnp.float32)
    args["k_cache"] = args["v_cache"] = jnp.zeros((2, 1, 32, 32))
    with pytest.raises(NotImplementedError, match="needs D of 64, 128 or 256, got 32"):
        mosaic_tpu.qkv_heads(**args, eps=EPS)
