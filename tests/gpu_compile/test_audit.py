"""The audit of a function compiled for an H100 that is not here."""

import jax
import jax.numpy as jnp

import jdet
from jdet.certify import audit

SIZES = (1, 8, 512)
WIDTH, OUT = 4096, 512


def shapes(n: int) -> list[jax.ShapeDtypeStruct]:
    sizes = (n, WIDTH), (OUT, WIDTH), (WIDTH,)
    return [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in sizes]


def test_plain_jnp_is_cut_and_tiled_by_the_batch(on_h100):
    def layer(x, w, scale):
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))
        return (x.astype(jnp.bfloat16) * scale) @ w.T

    found = audit(layer, shapes, SIZES, place=on_h100)
    assert found.platform == "gpu"
    kinds = {(f.kind, f.op) for f in found.findings}
    assert {("split-K", "dot_general"), ("sum", "reduce_sum")} <= kinds, str(found)


def test_the_kernels_are_certified(on_h100):
    ops = jdet.Ops("mosaic_gpu")

    def layer(x, w, scale):
        return ops.log_softmax(ops.matmul(ops.rms_norm(x, scale, eps=1e-5)[0], w))

    options = jdet.compiler_options("mosaic_gpu", "cuda")
    found = audit(layer, shapes, SIZES, place=on_h100, compiler_options=options)
    assert found.certified, str(found)
    assert sum(found.kernels.values()) >= 3
