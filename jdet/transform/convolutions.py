"""Convolutions as one product of patches with kernels, in the tree of `dots.contract`.

The contracted extent is (kernel positions) x (input features of a group), in this order; padding
and dilation add zeros to it. Feature groups and batch groups are batch dimensions of the product.
In the layout NHWC with kernels HWIO nothing is transposed.

Depthwise (one input and one output feature a group): elementwise products, each rounded, added in
ascending kernel positions.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from jdet.transform import dots
from jdet.transform.fixed import Fixed, alone, narrowed, wide
from jdet.transform.rules import Rules


def _padded(x: Array, params: dict[str, Any]) -> Array:
    """x [N, *space, C] as the window moves over it."""
    config = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])


class _Axis(NamedTuple):
    """How the window moves along an axis of space."""

    axis: int
    extent: int
    stride: int
    dilation: int

    def positions(self, x: Array) -> int:
        span = (self.extent - 1) * self.dilation + 1
        return max((x.shape[self.axis] - span) // self.stride + 1, 0)

    def tap(self, x: Array, i: int, positions: int) -> Array:
        """What place i of the window sees, by position."""
        start = i * self.dilation
        end = start + max(positions - 1, 0) * self.stride + (positions > 0)
        return lax.slice_in_dim(x, start, end, self.stride, self.axis)

    def taps(self, x: Array) -> Array:
        """x [N, *space, ..., C] -> [N, *(positions on this axis), ..., extent, C]."""
        positions = self.positions(x)
        if self.extent == self.stride and self.dilation == 1:
            x = lax.slice_in_dim(x, 0, positions * self.extent, 1, self.axis)
            shape = x.shape[: self.axis], (positions, self.extent), x.shape[self.axis + 1 :]
            return jnp.moveaxis(x.reshape(*sum(shape, ())), self.axis + 1, -2)
        return jnp.stack([self.tap(x, i, positions) for i in range(self.extent)], -2)


def _axes(kernel: Sequence[int], params: dict[str, Any]) -> list[_Axis]:
    moves = zip(kernel, params["window_strides"], params["rhs_dilation"], strict=True)
    return [_Axis(i + 1, *move) for i, move in enumerate(moves)]


def _depthwise(x: Array, w: Array, axes: Sequence[_Axis], platform: str | None, out: Any) -> Array:
    """x [N, *space, C], w [*kernel, C] -> [N, *positions, C]."""
    dtype = wide(jnp.promote_types(x.dtype, w.dtype))
    x, w = x.astype(dtype), w.astype(dtype)
    positions = [axis.positions(x) for axis in axes]
    y = jnp.zeros((x.shape[0], *positions, x.shape[-1]), dtype)
    for place in itertools.product(*(range(axis.extent) for axis in axes)):
        seen = x
        for axis, i, count in zip(axes, place, positions, strict=True):
            seen = axis.tap(seen, i, count)
        y = y + alone(seen * w[place], platform)
    return narrowed(y, out)


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
    batch, channels, *space = numbers.lhs_spec
    outputs, inputs, *kernel = numbers.rhs_spec
    x, w = dots.prepared(x, w, params["precision"])
    x, w = x.transpose(batch, *space, channels), w.transpose(*kernel, inputs, outputs)
    axes = _axes(w.shape[: len(kernel)], params)
    x, n, (depth, features) = _padded(x, params), x.shape[0], w.shape[-2:]
    feature_groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    # From N, *positions, C to the order asked for.
    order = [0, len(axes) + 1, *range(1, len(axes) + 1)]
    order = [order[numbers.out_spec.index(i)] for i in range(len(order))]
    if depth == 1 and batch_groups == 1 and features == feature_groups:
        return _depthwise(x, w[..., 0, :], axes, platform, aval.dtype).transpose(order)
    groups = feature_groups * batch_groups
    positions, taps = [axis.positions(x) for axis in axes], math.prod(w.shape[: len(kernel)])
    for axis in axes:
        x = axis.taps(x)
    if groups > 1:
        x = x.reshape(batch_groups, n // batch_groups, -1, taps, feature_groups, depth)
        x = x.transpose(0, 4, 1, 2, 3, 5)
        w = w.reshape(taps, depth, groups, -1).transpose(2, 0, 1, 3)
    x, w = x.reshape(groups, -1, taps * depth), w.reshape(groups, taps * depth, -1)
    y = dots.contract(dots.Matrix(x), dots.Matrix(w, k_last=False), platform, rules, aval.dtype)
    y = y.swapaxes(0, 1) if groups > 1 else y
    return y.reshape(n // batch_groups, *positions, features).transpose(order)


FIXED = {"conv_general_dilated": Fixed(_lower, dots.applies, dots.refuses)}
