"""Operands of a dot as matrices that lie as the operands do."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


class Matrix(NamedTuple):
    """An operand, [B, F, K] where `k_last`, else [B, K, F]: as it lies in memory."""

    array: Array
    k_last: bool = True

    @property
    def free(self) -> int:
        return self.array.shape[1 if self.k_last else 2]

    def rows(self) -> Array:
        """[B, F, K]"""
        return self.array if self.k_last else self.array.swapaxes(1, 2)

    def split(self, leaves: int) -> "list[Matrix]":
        """In equal parts of K."""
        parts = jnp.split(self.array, leaves, 2 if self.k_last else 1)
        return [Matrix(part, self.k_last) for part in parts]

    def map(self, f: Callable[[Array], Array]) -> "Matrix":
        return Matrix(f(self.array), self.k_last)


def matrix_of(
    x: Array, batch: Sequence[int], contracted: Sequence[int]
) -> tuple[Matrix, list[int]]:
    """x as a matrix, and its free axes."""
    free = [i for i in range(x.ndim) if i not in batch and i not in contracted]
    k_last = not free or x.ndim - 1 not in free
    inner = (free, contracted) if k_last else (contracted, free)
    x = x.transpose(*batch, *inner[0], *inner[1])
    extents = [math.prod(x.shape[: len(batch)])]
    extents.append(math.prod(x.shape[len(batch) : len(batch) + len(inner[0])]))
    extents.append(math.prod(x.shape[len(batch) + len(inner[0]) :]))
    return Matrix(x.reshape(extents), k_last), free


def pad(x: Array, extent: int, axis: int = 1) -> Array:
    """x with zeros up to `extent` along an axis."""
    missing = extent - x.shape[axis]
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if missing > 0 else x


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def product(x: Array, y: Array, out: DTypeLike, k_last: bool = True) -> Array:
    return lax.dot_general(
        x,
        y,
        (((2,), (2 if k_last else 1,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=out,
    )
