"""Fixed trees of elementwise operations: what XLA cannot re-order whatever the shape.

XLA picks the emitter, the tile and so the order of a `reduce` by shape and by the
surrounding fusion; on CPU it also hands `exp` and `log` to a vector routine for the bulk
of an array and to another routine for its tail, and the two differ in the last bit
(scripts/bench/results/cpu-dot-classes.json: about a tenth of the elements of `exp` change
at lengths 3, 5, 6 and 7). The functions here are made of additions, multiplications,
comparisons and integer operations alone, with no tail of their own.

LLVM may still contract a product and an addition of one fusion into an FMA, which rounds
once instead of twice. The result was found the same for every number of rows and every
surrounding program tried (`test_tree_sum_does_not_follow_the_batch` and
`test_element_does_not_follow_the_length_of_its_array` in tests/pallas_kernels/test_trees.py,
`test_row_does_not_follow_the_batch` and `test_surroundings_do_not_matter` in
test_rms_norm.py); where it matters most, in the sum of squares of rms_norm/portable.py, the
contraction is prevented.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

_LOG2_E = 1.4426950408889634
# ln 2 in two parts: the first has 15 trailing zero bits, so that n * _LN2_HIGH is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
# Minimax coefficients of the Cephes library (S. Moshier, netlib.org/cephes, expf, logf, tanhf).
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_TANH = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)
_GELU = (1.5957691216057308, 0.07135481627260025)  # 2 sqrt(2 / pi), and 0.044715 times it
_SQRT_HALF = 0.70710678118654752440


def wide_dtype(x: Array) -> Any:
    """What a reference computes x in: float32, or float64 where x is that (the oracle)."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _polynomial(
    x: Float32[Array, "*s"],
    coefficients: tuple[float, ...],
    times: Callable[[Any, Any], Any] = operator.mul,
) -> Float32[Array, "*s"]:
    y: Any = coefficients[0]
    for c in coefficients[1:]:
        y = times(x, y) + jnp.float32(c)
    return y


def tree_sum(x: Float32[Array, "*rows n"]) -> Float32[Array, "*rows"]:
    """Sum over the last axis in a tree that depends on its length alone.

    Tree: the second half is added to the first, elementwise, until one value is left;
    an odd length is first padded by one zero. Depth ceil(log2 n), float32.
    """
    n = x.shape[-1]
    while n > 1:
        if n % 2:
            x = jnp.concatenate([x, jnp.zeros_like(x[..., :1])], axis=-1)
            n += 1
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x[..., 0]


def prefix_sums(x: Float32[Array, "*rows n"]) -> Float32[Array, "*rows n"]:
    """Sums of the first 1, 2, ... n elements of the last axis, in trees that depend on n alone.

    Tree: to each element the one 1 before it is added, then 2, 4, ... before, float32 (Hillis &
    Steele, "Data Parallel Algorithms", CACM 29(12), 1986). A loop, which compiles in a fourth of
    the time of `lax.associative_scan`'s unrolled tree; unrolled for CUDA, where a loop inside a
    conditional keeps the whole conditional out of the graph of a decode step.
    """
    index, rounds = jnp.arange(x.shape[-1]), (x.shape[-1] - 1).bit_length()

    def add(i: Int32[Array, ""], x: Float32[Array, "*rows n"]) -> Float32[Array, "*rows n"]:
        distance = jnp.left_shift(jnp.int32(1), i)
        return x + jnp.where(index >= distance, jnp.roll(x, distance, axis=-1), 0)

    def unrolled(x: Float32[Array, "*rows n"]) -> Float32[Array, "*rows n"]:
        for i in range(rounds):
            # Apart, since each reads the one before it twice: fused they would double each time.
            x = lax.optimization_barrier(add(jnp.int32(i), x))
        return x

    return lax.platform_dependent(
        x, cuda=unrolled, default=lambda x: lax.fori_loop(0, rounds, add, x)
    )


def balanced_sum(parts: list[Float32[Array, "*s"]]) -> Float32[Array, "*s"]:
    """Add a power of two of arrays in a balanced binary tree of neighbours."""
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2)]
    return parts[0]


def exp(
    x: Float32[Array, "*s"],
    times: Callable[[Any, Any], Any] = operator.mul,
    floor: Callable[[Any], Any] = jnp.floor,
) -> Float32[Array, "*s"]:
    """e**x in float32, within 2 ulp; 0 below -87.3, e**88.3 above 88.3; exp(0) is exactly 1.

    A kernel whose compiler could join a product and a sum gives its own `times`.
    """
    clipped = jnp.clip(x, -87.33654, 88.3762626647949)
    n = floor(times(clipped, _LOG2_E) + jnp.float32(0.5))
    r = clipped - times(n, _LN2_HIGH) - times(n, _LN2_LOW)
    y = times(_polynomial(r, _EXP, times), times(r, r)) + r + jnp.float32(1.0)
    scale = lax.bitcast_convert_type((n.astype(jnp.int32) + 127) << 23, jnp.float32)
    return jnp.where(x < jnp.float32(-87.33654), jnp.float32(0.0), times(y, scale))


def log(x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """ln(x) in float32 for normal positive x, within 2 ulp; -inf at 0."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = ((bits >> 23) - 126).astype(jnp.float32)
    mantissa = lax.bitcast_convert_type((bits & 0x007FFFFF) | 0x3F000000, jnp.float32)
    low = mantissa < jnp.float32(_SQRT_HALF)
    exponent = jnp.where(low, exponent - 1, exponent)
    m = jnp.where(low, mantissa + mantissa, mantissa) - jnp.float32(1.0)
    z = m * m
    y = _polynomial(m, _LOG) * (m * z)
    y = y + exponent * jnp.float32(_LN2_LOW) - jnp.float32(0.5) * z
    y = m + y + exponent * jnp.float32(_LN2_HIGH)
    return jnp.where(x == 0, -jnp.inf, y)


def tanh(x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """tanh(x) in float32, within 2 ulp: a polynomial below 0.625, of e**2x beyond."""
    size = jnp.abs(x)
    square = x * x
    near = _polynomial(square, _TANH) * square * x + x
    far = jnp.float32(1.0) - jnp.float32(2.0) / (exp(size + size) + jnp.float32(1.0))
    return jnp.where(size < jnp.float32(0.625), near, jnp.where(x < 0, -far, far))


def silu(x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """x / (1 + e**-x)."""
    return x / (jnp.float32(1.0) + exp(-x))


def gelu_tanh(x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 x**3), as x / (1 + e**-2u)."""
    twice = x * (jnp.float32(_GELU[0]) + jnp.float32(_GELU[1]) * (x * x))
    return x / (jnp.float32(1.0) + exp(-twice))
