"""Assertions for tests: equal bits, and bits that do not depend on the batch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jdet.certify.sides import axes_of, batch_size
from jdet.testing.bits import first_difference, host

SIZES = (1, 2, 5, 8, 33)


class BatchVariance(AssertionError):
    """A row has other bits in a batch than alone.

    Attributes:
      alone, batch: the arguments of the two runs, as `jdet.certify.bisect` takes them.
      row: the request's row in `batch`; in `alone` it is 0.
    """

    def __init__(self, message: str, alone: Any, batch: Any, row: int) -> None:
        super().__init__(message)
        self.alone, self.batch, self.row = alone, batch, row


def assert_same_bits(a: Any, b: Any) -> None:
    """Every array of two trees has the same bits: NaN equals itself, -0.0 is not 0.0.

    Raises:
      AssertionError: another structure, shape, dtype or bit; of the first array that differs,
        the first index, both values in hexadecimal and decimal, and the distance in ULPs.
    """
    (one, structure), (two, other) = (jax.tree_util.tree_flatten_with_path(x) for x in (a, b))
    if structure != other:
        raise AssertionError(f"other structures: {structure} and {other}")
    for (path, x), (_, y) in zip(one, two, strict=True):
        where = f"array {jax.tree_util.keystr(path)}: " if path else ""
        try:
            found = first_difference(x, y)
        except ValueError as error:
            raise AssertionError(f"{where}{error}") from None
        if found:
            raise AssertionError(f"{where}{found}")


def assert_batch_invariant(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    batch_axes: Any = 0,
    out_axes: Any = 0,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    compiler_options: dict[str, Any] | None = None,
) -> None:
    """Row 0 of `args` alone, and in batches at several rows, gives fn's results the same bits.

    A batch of `sizes` rows holds it at its first, its last and a random row, between random
    neighbours: their elements are drawn from the argument's own (so a token id stays one),
    floats scaled by a power of two for each row.

    Args:
      fn: a function of arrays, or a jitted one (which keeps its own compiler options).
      args: any number of rows; the first is the request.
      batch_axes: the batch axis of each argument, as in_axes of `jax.vmap`; None for what all
        rows share.
      out_axes: likewise of the result; None for what is not a row's, and not compared.
      sizes: of the batches; 1 adds a second run alone.
      seed: of neighbours and rows.

    Raises:
      BatchVariance: other bits; names the size, the row, the array, the index and the values.
      AssertionError: fn did not run a batch of the size meant.
      ValueError: sizes or axes that fit no batch.
    """
    sizes = [int(n) for n in sizes]
    if not sizes or min(sizes) < 1 or max(sizes) < 2:
        raise ValueError(f"sizes={tuple(sizes)}: give sizes from 1 up, one of them 2 or more")
    leaves, structure = jax.tree.flatten(tuple(args))
    axes = axes_of(batch_axes, tuple(args), "batch_axes")
    batch_size(leaves, axes, "args")
    run = fn if hasattr(fn, "trace") else jax.jit(fn, compiler_options=compiler_options)
    rng = np.random.default_rng(seed)

    def batch(size: int, row: int) -> Any:
        pool = _Neighbours(rng, size, row)
        made = [
            leaf if axis is None else pool.around(leaf, axis)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        return jax.tree.unflatten(structure, made)

    alone_args = batch(1, 0)
    alone = _rows(run(*alone_args), out_axes, 1, 0)
    if not alone:
        raise ValueError(f"out_axes={out_axes!r}: no result has a batch axis to compare")
    for size in sizes:
        for row in dict.fromkeys((0, size - 1, int(rng.integers(size)))):
            given = batch(size, row)
            got = _rows(run(*given), out_axes, size, row)
            for path, wanted in alone.items():
                try:
                    found = first_difference(wanted, got[path])
                except ValueError as error:
                    found = error
                if found:
                    name = getattr(fn, "__name__", repr(fn))
                    raise BatchVariance(
                        f"{name}: row {row} of a batch of {size} has not the bits that it has "
                        f"alone: result{path} {found}; jdet.certify.bisect(fn, error.alone, "
                        f"error.batch, 0, {row}, ...) names the operation",
                        alone_args,
                        given,
                        row,
                    )


class _Neighbours:
    """Batches of one size around row 0 of an array, at one row."""

    def __init__(self, rng: np.random.Generator, size: int, row: int) -> None:
        self.rng, self.size, self.row = rng, size, row

    def around(self, leaf: Any, axis: int) -> jax.Array:
        """`leaf` with `size` rows along `axis`, its row 0 at `row`."""
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            words = jnp.moveaxis(leaf, axis, 0)
            data = self._rows(host(words), own=False)
            keys = jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(leaf))
            return jnp.moveaxis(keys, 0, axis)
        rows = self._rows(np.moveaxis(np.asarray(leaf), axis, 0), own=True)
        return jnp.asarray(np.moveaxis(rows, 0, axis))

    def _rows(self, array: NDArray[Any], *, own: bool) -> NDArray[Any]:
        """Rows along axis 0. `own`: of the array's elements; else of any bits of its dtype."""
        shape = (self.size, *array.shape[1:])
        if own:
            made = self.rng.choice(array.reshape(-1), shape) if array.size else np.empty(shape)
            made = made.astype(array.dtype)
            if jnp.issubdtype(array.dtype, jnp.inexact):
                scales = 2.0 ** self.rng.integers(-3, 4, self.size)
                made *= scales.reshape(-1, *[1] * (array.ndim - 1)).astype(array.dtype)
        else:
            made = self.rng.integers(0, np.iinfo(array.dtype).max, shape, array.dtype)
        made[self.row] = array[0]
        return made


def _rows(result: Any, out_axes: Any, size: int, row: int) -> dict[str, NDArray[Any]]:
    """The row's part of every result that has a batch axis, by its path in the result."""
    found = {}
    axes = axes_of(out_axes, result, "out_axes")
    for (path, leaf), axis in zip(
        jax.tree_util.tree_flatten_with_path(result)[0], axes, strict=True
    ):
        if axis is None:
            continue
        shape = np.shape(leaf)
        if not -len(shape) <= axis < len(shape) or shape[axis] != size:
            raise AssertionError(
                f"no batch of {size} rows was formed: result{jax.tree_util.keystr(path)} has "
                f"shape {shape}, and its batch axis is {axis}"
            )
        whole = functools.partial(np.take, axis=axis % len(shape))
        found[jax.tree_util.keystr(path)] = whole(host(leaf), row)
    return found
