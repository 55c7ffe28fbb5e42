"""A decoder's parameters where no file is read: random ones, or ones that wait for their values."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def random_weight(
    rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype: DTypeLike, scale: float | None = None
) -> nnx.Param:
    """Normal random weights [..., out, in], times `scale`.

    The default keeps the variance of their input. Without rngs: shape and dtype alone.
    """
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
    if scale is None:
        scale = 1 / math.sqrt(shape[-1])
    return nnx.Param((rngs.params.normal(shape, jnp.float32) * scale).astype(dtype))


def ones(rngs: nnx.Rngs | None, size: int, dtype: DTypeLike) -> nnx.Param:
    """The weights of a norm, [size]; without rngs: shape and dtype alone."""
    return nnx.Param(
        jax.ShapeDtypeStruct((size,), dtype) if rngs is None else jnp.ones(size, dtype)
    )
