"""Which axis of a value holds the rows of the batch.

A value's axis is read off two traces at different batch sizes: it is the one dimension that
grows with the batch. Where that does not say it (the batch padded to a tile, merged with the
length, cut into a slice), it follows from the layouts of the operands. What cannot be told is
`UNKNOWN` and compared with nothing.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jdet.certify.program import Program, Step, align


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where a row stands on `axis`.

    From `offset` on, the axis is (major, extent, minor) in C order, and row r is [:, r, :].
    What stands before and behind is padding.
    """

    axis: int
    extent: int
    major: int = 1
    minor: int = 1
    offset: int = 0

    @property
    def size(self) -> int:
        """What of the axis the rows take."""
        return self.major * self.extent * self.minor

    def fills(self, shape: Sequence[int]) -> bool:
        """There is no padding."""
        return self.offset == 0 and shape[self.axis] == self.size

    def take(self, value: NDArray[Any], row: int) -> NDArray[Any]:
        """One row: the shape without the axis, or with what is merged into it."""
        before, after = value.shape[: self.axis], value.shape[self.axis + 1 :]
        held = np.take(value, range(self.offset, self.offset + self.size), self.axis)
        split = held.reshape(*before, self.major, self.extent, self.minor, *after)
        merged = self.major * self.minor
        shape = (*before, *(() if merged == 1 else (merged,)), *after)
        return np.take(split, row, len(before) + 1).reshape(shape)


@dataclasses.dataclass(frozen=True)
class NoRows:
    """A value without a batch axis. `SHARED`: all rows see it whole. `UNKNOWN`: not told."""

    name: str


SHARED = NoRows("shared")
UNKNOWN = NoRows("unknown")
type Layout = Rows | NoRows


def layouts(
    program: Program, probe: Program, size: int, probe_size: int, inputs: Sequence[Layout]
) -> dict[int, Layout]:
    """The layout of every value of `program`, a trace at batch `size`.

    Args:
      probe: the same function's trace at `probe_size` rows.
      inputs: the layouts of the program's inputs.
    """
    found: dict[int, Layout] = dict(zip(program.inputs, inputs, strict=True))
    for value in program.constants:
        found[value] = SHARED if math.prod(program.shapes[value]) == 1 else UNKNOWN
    for step, other in align(program, probe):
        if step is None:
            continue
        if other is not None:
            for value, twin in zip(step.inputs, other.inputs, strict=False):
                if value in program.constants and twin in probe.constants:
                    shapes = program.shapes[value], probe.shapes[twin]
                    found[value] = _grown(*shapes, size, probe_size) or UNKNOWN
        operands = [(found[i], program.shapes[i]) for i in step.inputs]
        for number, (value, shape) in enumerate(zip(step.outputs, step.shapes, strict=True)):
            seen = _grown(shape, other.shapes[number], size, probe_size) if other else None
            found[value] = _layout(step, operands, shape, seen)
    return found


def _layout(
    step: Step,
    operands: Sequence[tuple[Layout, tuple[int, ...]]],
    shape: tuple[int, ...],
    seen: Layout | None,
) -> Layout:
    """Of a step's output; `seen`: as the two shapes alone have it, None where they do not say."""
    told = _told(step, operands, shape)
    if told is not None and (seen is None or _agree(told, seen, shape)):
        return told
    if isinstance(seen, Rows):
        if step.primitive == "broadcast_in_dim" and math.prod(operands[0][1]) == 1:
            # Of one number, in whatever order rows are merged into the axis.
            return seen
        return seen if seen.major * seen.minor == 1 else _merged_as(seen, operands) or UNKNOWN
    # Of rows with padding around them the shapes may be the same at both sizes.
    padded = any(x is UNKNOWN or isinstance(x, Rows) and not x.fills(s) for x, s in operands)
    return SHARED if seen is SHARED and not padded else UNKNOWN


def _grown(shape: Sequence[int], other: Sequence[int], size: int, probe: int) -> Layout | None:
    if len(shape) != len(other):
        return None
    axes = [i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    if not axes:
        return SHARED
    a, b = shape[axes[0]], other[axes[0]]
    if len(axes) > 1 or a % size or a // size * probe != b:
        return None
    return Rows(axes[0], size, major=a // size)


def _agree(told: Layout, seen: Layout, shape: tuple[int, ...]) -> bool:
    """Both may be true of a value of this shape."""
    if isinstance(seen, Rows):
        return isinstance(told, Rows) and told.axis == seen.axis
    # Padding may take up what the batch grows by; rows that fill the axis show.
    return not isinstance(told, Rows) or not told.fills(shape)


def _merged_as(seen: Rows, operands: Sequence[tuple[Layout, Any]]) -> Rows | None:
    """`seen`, merged in the order that an operand's axis of the same size is."""
    for layout, _ in operands:
        if isinstance(layout, Rows) and layout.major * layout.minor == seen.major:
            return dataclasses.replace(layout, axis=seen.axis)
    return None


def _told(
    step: Step, operands: Sequence[tuple[Layout, tuple[int, ...]]], shape: tuple[int, ...]
) -> Layout | None:
    """By what the primitive does with its operands' axes; None where no rule knows."""
    params = step.params
    rows = [(i, x, s) for i, (x, s) in enumerate(operands) if isinstance(x, Rows)]
    if not rows:
        return None
    i, layout, source = rows[0]

    def at(axis: int) -> Rows:
        return dataclasses.replace(layout, axis=axis)

    match step.primitive:
        case "reshape":
            return _reshaped(layout, source, shape)
        case "transpose":
            return at(list(params["permutation"]).index(layout.axis))
        case "broadcast_in_dim":
            return at(params["broadcast_dimensions"][layout.axis])
        case "squeeze":
            gone = [d % len(source) for d in params["dimensions"]]
            return at(layout.axis - sum(d < layout.axis for d in gone))
        case "expand_dims":
            kept = [d for d in range(len(shape)) if d not in params["dimensions"]]
            return at(kept[layout.axis])
        case "dot_general":
            return _product(params["dimension_numbers"], rows, operands)
        case "slice" | "pad" if source[layout.axis] != shape[layout.axis]:
            return _moved(step, layout, shape)
        case "slice" | "pad" | "dynamic_slice" | "split" | "top_k":
            kept = len(shape) == len(source) and source[layout.axis] == shape[layout.axis]
            return layout if i == 0 and kept else None
        case "concatenate":
            return layout if params["dimension"] != layout.axis else None
        case "gather" | "rev" | "scan" | "while" | "cond" | "dot" | "conv_general_dilated":
            return None
        case name if name.startswith(("reduce_", "arg")) and "axes" in params:
            if layout.axis in params["axes"]:
                return SHARED
            return at(layout.axis - sum(d < layout.axis for d in params["axes"]))
        case _:
            # Elementwise, sorts, cumulative sums, updates in place.
            same = [x for _, x, s in rows if s == shape]
            return same[0] if same else None


def _reshaped(layout: Rows, source: tuple[int, ...], shape: tuple[int, ...]) -> Rows | None:
    """The batch is a digit of the elements' count in C order: on the axis that holds it whole."""
    behind = math.prod(source[layout.axis + 1 :])
    stride, offset = layout.minor * behind, layout.offset * behind
    padded = not layout.fills(source)
    if padded and (layout.major > 1 or math.prod(source[: layout.axis]) > 1):
        return None
    inner = 1
    for axis in reversed(range(len(shape))):
        size = shape[axis]
        reach = inner * size
        if padded:
            whole = math.prod(shape[:axis]) == 1 and offset + stride * layout.extent <= reach
        else:
            whole = reach % (stride * layout.extent) == 0
        if whole and stride % inner == 0 and offset % inner == 0:
            minor = stride // inner
            major = 1 if padded else size // (minor * layout.extent)
            return Rows(axis, layout.extent, major, minor, offset // inner)
        inner = reach
    return None


def _moved(step: Step, layout: Rows, shape: tuple[int, ...]) -> Rows | None:
    """A batch axis cut or padded: the rows keep their order and begin elsewhere."""
    if step.primitive == "pad":
        low, _, interior = step.params["padding_config"][layout.axis]
        if interior:
            return None
    else:
        strides = step.params["strides"]
        if strides is not None and strides[layout.axis] != 1:
            return None
        low = -step.params["start_indices"][layout.axis]
    moved = dataclasses.replace(layout, offset=layout.offset + low)
    inside = moved.offset >= 0 and moved.offset + moved.size <= shape[layout.axis]
    return moved if inside else None


def _product(
    numbers: Any,
    rows: Sequence[tuple[int, Rows, tuple[int, ...]]],
    operands: Sequence[tuple[Layout, tuple[int, ...]]],
) -> Layout | None:
    (left, right), (left_batch, right_batch) = numbers
    for side, layout, shape in rows:
        contracted, batch = (left, left_batch) if side == 0 else (right, right_batch)
        if layout.axis in contracted:
            return SHARED
        if layout.axis in batch:
            return dataclasses.replace(layout, axis=list(batch).index(layout.axis))
        if len(rows) > 1:
            return None
        free = [d for d in range(len(shape)) if d not in (*contracted, *batch)]
        before = len(batch)
        if side == 1:
            before += len(operands[0][1]) - len(left) - len(left_batch)
        return dataclasses.replace(layout, axis=before + free.index(layout.axis))
    return None
