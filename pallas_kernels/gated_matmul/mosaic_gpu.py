"""Gated matmul for Hopper in Pallas Mosaic GPU: the matmul with SiLU or GELU in its epilogue.

y[m, f] = act(g) * u, g = x[m] . w[f], u = x[m] . w[F + f]; w is [2 F, K], gate above up.
bfloat16 or float16 operands, and results of their dtype.

Tree: g and u are what `matmul` of mosaic_gpu returns, bit for bit (the same accumulators, one
leaf, rounded to the operands' dtype). Then, in float32, one fixed sequence of instructions for
every element (`silu_mul`, `gelu_mul`), so that no compiler can fuse it one way in one schedule
and another way in the next; then one rounding.

The formula, with c = -log2(e) rounded to float32 and c' the rest of it:

    h = min(g, 100)                 above, 1 + e**-g is 1; keeps what follows finite
    t = h * c                       e**-g is 2**(t + r)
    r = fma(h, c', fma(h, c, -t))   what the rounding of t and of c left out
    d = fma(ex2.approx(t), fma(r, ln 2, 1), 1)
    y = g * rcp.approx(d) * u

Error of silu(g) against float64, from the bounds of the instructions (PTX manual: ex2.approx
2 ulp, rcp.approx 1 ulp): at most 5 * 2**-23 of the result for closed gates, 3.3 * 2**-23 for
g > 0; over every bfloat16 gate an H100 showed 2.6 and 1.7 (scripts/check_gpu.py; the file is
scripts/bench/results/h100-check-gated.json). The rounding to bfloat16 is 2**14 times as coarse.
Below g = -87.3 the result is a zero; NaN stays NaN. For each result that makes 8 operations in
float32 and 2 of the special-function unit, about what the unit takes.

GELU in its tanh form is g / (1 + e**-z), z = 2 sqrt(2 / pi) (g + 0.044715 g**3): the same with

    z = g * fma(g * g, 0.0713548, 1.5957691)
    h = max(min(z, 100), -200)      and keeps g**3 finite

Its error over |g|: at most 1.3 * 2**-23 on an H100 (scripts/bench/results/h100-check-gelu.json).

Schedules: `Schedule.gated` in matmul/mosaic_gpu_schedules.py. A tile has bn / 2 rows of the gate
and the same rows of up, one below the other in shared memory: one wgmma gives both, and g and u
of one result lie in the same register file, bn / 2 columns apart. Rows of the gate's tile beyond
F read as zeros, not as rows of up: w is viewed as [2, F, K].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.gated_matmul import Activation
from jdet.pallas_kernels.matmul.mosaic_gpu import Schedule, matmul_gated

_MINUS_LOG2_E = -1.4426950216293335  # -log2(e) in float32
_REST = -1.92596298909109e-08  # -log2(e) - _MINUS_LOG2_E
_LN_2 = 0.6931471805599453
_GELU = (1.5957691216057308, 0.07135481627260025)  # 2 sqrt(2 / pi), and 0.044715 times it


def silu_mul(gate: jax.Array, up: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """silu(gate) * up of two tiles in registers, in float32, rounded to their dtype."""
    return _gate_mul(gate, up, layout, interpret, gelu=False)


def gelu_mul(gate: jax.Array, up: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """gelu(gate) * up of two tiles in registers, in float32, rounded to their dtype."""
    return _gate_mul(gate, up, layout, interpret, gelu=True)


def _gate_mul(
    gate: jax.Array, up: jax.Array, layout: Any, interpret: bool, *, gelu: bool
) -> jax.Array:
    g, u = gate.astype(jnp.float32), up.astype(jnp.float32)
    if interpret:  # no instructions there
        z = g * (_GELU[0] + _GELU[1] * g * g) if gelu else g
        return (g / (1 + jnp.exp(-z)) * u).astype(gate.dtype)

    @plgpu.inline_mgpu(
        arg_types=(layout, layout),
        return_type=plgpu.ShapeDtypeStruct(g.shape, g.dtype, layout=layout),
    )
    def apply(ctx, *tiles):
        del ctx
        g, u = tiles

        def do(instruction, x, *others):
            return x._pointwise(x._lift_fast_instr(instruction), *others)

        h = g
        if gelu:
            h = do("mul.rn.f32", g, do("fma.rn.f32", do("mul.rn.f32", g, g), _GELU[1], _GELU[0]))
            h = do("max.f32", h, -200.0)
        h = do("min.f32", h, 100.0)
        t = do("mul.rn.f32", h, _MINUS_LOG2_E)
        r = do("fma.rn.f32", h, _MINUS_LOG2_E, do("neg.f32", t))
        r = do("fma.rn.f32", h, _REST, r)
        e = do("ex2.approx.ftz.f32", t)
        d = do("fma.rn.f32", e, do("fma.rn.f32", r, _LN_2, 1.0), 1.0)
        s = do("mul.rn.f32", g, do("rcp.approx.ftz.f32", d))
        return do("mul.rn.f32", s, u)

    return apply(g, u).astype(gate.dtype)


GATES = {"silu": silu_mul, "gelu_tanh": gelu_mul}


def gated_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    activation: Activation = "silu",
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[M, F] = activation(x @ w[:F]^T) * (x @ w[F:]^T); see the module for the tree.

    Args:
      x: [M, K], bfloat16 or float16.
      w: [2 F, K], of x's dtype.
      activation: "silu" or "gelu_tanh".
      schedule: a gated one; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    return matmul_gated(x, w, GATES[activation], schedule=schedule, interpret=interpret)
