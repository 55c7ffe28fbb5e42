"""Single float32 instructions of PTX, for Mosaic GPU kernels.

A product and a sum written as such may be fused by LLVM or by ptxas, in one kernel and not in
another: both see `mul.f32` and `add.f32`, which promise no rounding of their own. Where the bits
would follow that choice, the kernel names the instruction.
"""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_SIMULATED = {
    "mul.rn.f32": lambda x, y: x * y,
    "div.full.f32": lambda x, y: x / y,
    "fma.rn.f32": lambda x, y, z: x * y + z,
    "rcp.approx.ftz.f32": lambda x: 1.0 / x,
}


def exact(instruction: str, layout: Any, interpret: bool, x: Any, *others: Any) -> jax.Array:
    """An instruction that no compiler may fuse with another; `others` are arrays or floats."""
    if interpret:
        return _SIMULATED[instruction](x, *others)
    arrays = [y for y in others if not isinstance(y, float)]

    @plgpu.inline_mgpu(
        arg_types=(layout,) * (1 + len(arrays)),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout),
    )
    def apply(ctx, x, *arrays):
        del ctx
        given = iter(arrays)
        full = [y if isinstance(y, float) else next(given) for y in others]
        return x._pointwise(x._lift_fast_instr(instruction), *full)

    return apply(x, *arrays)
