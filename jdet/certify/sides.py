"""The two runs that a bisection compares: their programs, values and rows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdet.certify.layouts import layouts
from jdet.certify.program import Program, Step, align, closed, flatten, trace
from jdet.certify.rows import SHARED, UNKNOWN, Layout, NoRows, Rows
from jdet.testing.bits import Difference, first_difference, host


@dataclasses.dataclass(frozen=True)
class Side:
    """One run.

    Attributes:
      program: at its batch size.
      probe: the same function at another one.
      size, probe_size: the two batch sizes.
      row: the request's.
      layouts: of the program's values.
      results: of its results, as the caller states them.
    """

    program: Program
    probe: Program
    size: int
    probe_size: int
    row: int
    layouts: dict[int, Layout]
    results: tuple[Layout, ...] = ()

    def inside(self, jaxpr: Any, probe: Any, inputs: Sequence[Layout]) -> "Side":
        """The body of a loop or branch; `inputs`: the layouts of what it is given."""
        program, other = flatten(closed(jaxpr)), flatten(closed(probe))
        found = layouts(program, other, self.size, self.probe_size, inputs)
        return dataclasses.replace(self, program=program, probe=other, layouts=found, results=())

    def twin(self, step: Step) -> Step | None:
        """The probe's step that is this one."""
        return next((p for s, p in align(self.program, self.probe) if s is step), None)

    def read(self, value: int, array: Any) -> np.ndarray[Any, Any] | None:
        """The request's row of a value, the whole of a shared one; None where not told."""
        layout = self.layouts[value]
        return None if layout is UNKNOWN else self.part(layout, array)

    def part(self, layout: Layout, array: Any) -> np.ndarray[Any, Any]:
        """The request's row of an array of this layout; the whole where it has no rows."""
        whole = host(array)
        if isinstance(layout, NoRows):
            return whole
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) and isinstance(layout, Rows):
            # The words of a key stand behind the axes of the array of keys.
            return np.take(whole, layout.offset + self.row, axis=layout.axis)
        return layout.take(whole, self.row)


# What two readings of one value can show.
SAME, RECUT, UNTOLD = "same", "recut", "untold"
type Comparison = Difference | str


def compare(a: Side, b: Side, values: tuple[int, int], x: Any, y: Any) -> Comparison:
    """SAME; a Difference; RECUT: a row of another shape; UNTOLD: its rows were not found."""
    one, other = a.read(values[0], x), b.read(values[1], y)
    if one is None or other is None:
        return UNTOLD
    if type(a.layouts[values[0]]) is not type(b.layouts[values[1]]):
        return UNTOLD
    if one.shape != other.shape or one.dtype != other.dtype:
        return RECUT
    return first_difference(one, other) or SAME


def axes_of(prefix: Any, tree: Any, what: str) -> list[int | None]:
    """The batch axis of every leaf, from a prefix of the tree as in `jax.vmap`'s in_axes.

    Raises:
      ValueError: not a prefix of it.
    """
    try:
        full = jax.tree_util.tree_broadcast(prefix, tree, is_leaf=lambda x: x is None)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{what}={prefix!r} does not fit what it describes: {reason}") from None
    return jax.tree.leaves(full, is_leaf=lambda x: x is None)


def batch_size(leaves: Sequence[Any], axes: Sequence[int | None], what: str) -> int:
    """The size of the batch axis, which all leaves that have one share.

    Raises:
      ValueError: none has one, one has too few axes, or they do not share it.
    """
    found = set()
    for leaf, axis in zip(leaves, axes, strict=True):
        if axis is None:
            continue
        shape = np.shape(leaf)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{what}: axis {axis} of an array of shape {shape} does not exist")
        found.add(shape[axis])
    if len(found) != 1:
        given = "no batch axis" if not found else f"batch axes of sizes {sorted(found)}"
        raise ValueError(f"{what}: {given}; one size is wanted")
    return found.pop()


def resized(tree: Any, axes: Sequence[int | None], size: int) -> Any:
    """The shapes of a tree of arrays at another batch size."""
    leaves, structure = jax.tree.flatten(tree)
    made = []
    for leaf, axis in zip(leaves, axes, strict=True):
        shape, dtype = list(np.shape(leaf)), jnp.result_type(leaf)
        if axis is not None:
            shape[axis] = size
        weak = getattr(leaf, "weak_type", not hasattr(leaf, "dtype"))
        made.append(jax.ShapeDtypeStruct(tuple(shape), dtype, weak_type=weak))
    return jax.tree.unflatten(structure, made)


def make_side(
    fn: Callable[..., Any],
    arguments: Sequence[Any],
    axes: Sequence[int | None],
    row: int,
    name: str,
) -> tuple[Side, Any]:
    """(the side, the shapes of fn's result).

    Raises:
      ValueError: see `batch_size` and `trace`; or the row is not in the batch.
    """
    leaves = jax.tree.leaves(arguments)
    size = batch_size(leaves, axes, f"args_{name}")
    if not 0 <= row < size:
        raise ValueError(f"row_{name}={row} is not in a batch of {size} rows")
    program, out = trace(fn, arguments)
    probe, probe_size = _probe(fn, arguments, axes, program, size)
    inputs = [
        SHARED if axis is None else Rows(axis % np.ndim(leaf), size)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    found = layouts(program, probe, size, probe_size, inputs)
    return Side(program, probe, size, probe_size, row, found), out


def _probe(
    fn: Callable[..., Any],
    arguments: Sequence[Any],
    axes: Sequence[int | None],
    program: Program,
    size: int,
) -> tuple[Program, int]:
    """A trace at a size at which the function is the same program, or most nearly so."""
    best = program, size, -1
    for other in (size + 1, 2 * size + 1, size - 1, size + 7):
        if other < 1:
            continue
        try:
            probe, _ = trace(fn, resized(arguments, axes, other))
        except ValueError:
            # Not every size need be one that the function takes.
            continue
        pairs = align(program, probe)
        agreed = sum(None not in pair for pair in pairs)
        if agreed > best[2]:
            best = probe, other, agreed
        if agreed == len(pairs):
            break
    return best[0], best[1]
