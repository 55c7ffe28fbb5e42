"""Random weights, for a model whose file is not read."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def random_weight(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """Random weights [..., out, in] that keep the variance of their input."""
    scale = 1 / math.sqrt(shape[-1])
    return nnx.Param((rngs.params.normal(shape, jnp.float32) * scale).astype(dtype))
