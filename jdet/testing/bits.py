"""Arrays compared as bit patterns: where they first differ, how far apart, in how many places."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two arrays of one shape and dtype differ; `str()` says it in a line.

    Attributes:
      index: of the first element that differs, in C order.
      values: the two elements there.
      bits: their bit patterns.
      ulps: the distance there, in units in the last place (of integers: the difference).
      max_ulps: the largest distance anywhere.
      count: how many elements differ.
      size: how many there are.
    """

    index: tuple[int, ...]
    values: tuple[Any, Any]
    bits: tuple[str, str]
    ulps: int
    max_ulps: int
    count: int
    size: int

    @property
    def share(self) -> float:
        """Of the elements, those that differ."""
        return self.count / self.size

    def __str__(self) -> str:
        (a, b), (a_bits, b_bits) = self.values, self.bits
        return (
            f"first at index {self.index}: {a_bits} ({a!s}) against {b_bits} ({b!s}), "
            f"{self.ulps} ULP; {self.count} of {self.size} elements differ, "
            f"by at most {self.max_ulps} ULP"
        )


def host(x: Any) -> NDArray[Any]:
    """x as numpy has it; random keys as the words they are made of."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def bit_patterns(x: Any) -> NDArray[np.unsignedinteger[Any]]:
    """x's bits as unsigned integers of its element's size; a complex number is two of them."""
    array = np.atleast_1d(np.ascontiguousarray(host(x)))
    size = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    return array.view(f"u{size}")


def ulp_distance(a: Any, b: Any) -> NDArray[np.float64]:
    """How many representable numbers lie between a and b, plus one where their bits differ.

    Numbers of one dtype in their order count 1 from each to the next; +0 and -0, which are
    equal, count 1 too, and so does a NaN beside another one. The result is float64, in which
    distances above 2**53 are rounded.
    """
    x, y = bit_patterns(a), bit_patterns(b)
    kind = host(a).dtype.kind
    if kind in "ui":
        # Object integers: a difference of two int64 need not fit one.
        distance = np.abs(np.asarray(host(a), object) - np.asarray(host(b), object))
        return np.asarray(distance, np.float64).reshape(x.shape)
    sign = np.uint64(1 << (8 * x.dtype.itemsize - 1))

    def split(bits: NDArray[Any]) -> tuple[NDArray[np.uint64], NDArray[np.bool]]:
        wide = bits.astype(np.uint64)
        return wide & (sign - np.uint64(1)), wide & sign != 0

    (p, p_negative), (q, q_negative) = split(x), split(y)
    apart = np.where(p > q, p - q, q - p).astype(np.float64)
    through_zero = p.astype(np.float64) + q.astype(np.float64)
    distance = np.where(p_negative == q_negative, apart, through_zero)
    return np.where(x == y, 0.0, np.maximum(distance, 1.0))


def first_difference(a: Any, b: Any) -> Difference | None:
    """How a and b differ; None where every bit is the same (NaN and -0.0 included).

    Raises:
      ValueError: another shape or dtype.
    """
    x, y = host(a), host(b)
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(
            f"{x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)} cannot have the same bits"
        )
    different = bit_patterns(x) != bit_patterns(y)
    if not different.any():
        return None
    distances = ulp_distance(x, y)
    if x.dtype.kind == "c":
        pairs = (*np.shape(np.atleast_1d(x)), 2)
        different = different.reshape(pairs).any(-1)
        distances = distances.reshape(pairs).max(-1)
    different, distances = different.reshape(x.shape), distances.reshape(x.shape)
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(different)), x.shape))

    def bits(array: NDArray[Any]) -> str:
        element = np.asarray(array[index])
        return "0x" + np.ascontiguousarray(element).tobytes()[::-1].hex()

    return Difference(
        index=index,
        values=(x[index], y[index]),
        bits=(bits(x), bits(y)),
        ulps=int(distances[index]),
        max_ulps=int(distances.max()),
        count=int(different.sum()),
        size=x.size,
    )
