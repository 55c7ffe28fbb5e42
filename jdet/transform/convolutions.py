"""Convolutions as one product of patches with kernels, in the tree of `dots.contract`.

The contracted extent is (input features of a group) x (kernel positions), in this order; padding
and dilation add zeros to it. Feature groups and batch groups are batch dimensions of the product.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from jdet.transform import dots
from jdet.transform.fixed import Fixed
from jdet.transform.rules import Rules


def _patches(x: Array, extents: Sequence[int], params: dict[str, Any]) -> Array:
    """x [N, C, *space] -> [N, C, *positions, *kernel]."""
    config = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *config])
    strides, dilations = params["window_strides"], params["rhs_dilation"]
    count = len(extents)
    for i, (extent, stride, dilation) in enumerate(zip(extents, strides, dilations, strict=True)):
        axis = 2 + 2 * i
        positions = max((x.shape[axis] - (extent - 1) * dilation - 1) // stride + 1, 0)
        starts = jnp.arange(positions, dtype=jnp.int32) * stride
        index = starts[:, None] + jnp.arange(extent, dtype=jnp.int32) * dilation
        x = jnp.take(x, index, axis=axis, mode="clip")
    order = [2 + 2 * i for i in range(count)] + [3 + 2 * i for i in range(count)]
    return x.transpose(0, 1, *order)


def _lower(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    x, w = args
    aval, _ = primitive.abstract_eval(jax.typeof(x), jax.typeof(w), **params)
    numbers = params["dimension_numbers"]
    x, w = x.transpose(numbers.lhs_spec), w.transpose(numbers.rhs_spec)
    x, w = dots.prepared(x, w, params["precision"])
    kernel = w.shape[2:]
    x = _patches(x, kernel, params)
    positions = x.shape[2 : 2 + len(kernel)]
    features, taps = params["feature_group_count"], math.prod(kernel)
    batches = params["batch_group_count"]
    n, groups = x.shape[0], features * batches
    x = x.reshape(batches, n // batches, features, -1, math.prod(positions), taps)
    # [batch group, feature group, N, positions, input features, taps]
    x = x.transpose(0, 2, 1, 4, 3, 5).reshape(groups, -1, w.shape[1] * taps)
    w = w.reshape(groups, w.shape[0] // groups, w.shape[1] * taps)
    y = dots.contract(x, w, platform, rules, aval.dtype)
    y = y.reshape(groups, n // batches, *positions, w.shape[1])
    y = jnp.moveaxis(jnp.moveaxis(y, -1, 1), 2, 0)
    y = y.reshape(n // batches, groups * w.shape[1], *positions)
    return y.transpose([numbers.out_spec.index(i) for i in range(y.ndim)])


FIXED = {"conv_general_dilated": Fixed(_lower, dots.applies, dots.refuses)}
