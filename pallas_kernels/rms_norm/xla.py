"""RMSNorm by plain XLA: not batch-invariant. The negative control and the speed baseline."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import wide_dtype


def rms_norm(
    x: Float[Array, "*rows D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    residual: Float[Array, "*rows D"] | None = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """(weight * s / sqrt(mean(s**2) + eps), s) where s = x + residual (x when None).

    XLA owns the order of the sum.
    """
    wide = wide_dtype(x)
    s = x if residual is None else (x.astype(wide) + residual.astype(wide)).astype(x.dtype)
    v = s.astype(wide)
    scale = 1 / jnp.sqrt(jnp.mean(v * v, axis=-1, keepdims=True) + eps)
    return (v * scale * weight.astype(wide)).astype(x.dtype), s
