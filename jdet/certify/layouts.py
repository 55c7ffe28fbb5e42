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

from jdet.certify.program import Program, Step, align
from jdet.certify.rows import SHARED, UNKNOWN, Layout, Rows, Tiles, merged


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
    padded = any(
        x is UNKNOWN or isinstance(x, Tiles) or isinstance(x, Rows) and not x.fills(s)
        for x, s in operands
    )
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
        if not isinstance(layout, Rows) or layout.span > 1:
            continue
        if layout.major * layout.minor == seen.major:
            return dataclasses.replace(layout, axis=seen.axis)
    return None


def _told(
    step: Step, operands: Sequence[tuple[Layout, tuple[int, ...]]], shape: tuple[int, ...]
) -> Layout | None:
    """By what the primitive does with its operands' axes; None where no rule knows."""
    params = step.params
    rows = [(i, x, s) for i, (x, s) in enumerate(operands) if isinstance(x, Rows)]
    if not rows:
        return _told_of_tiles(step, operands, shape)
    i, layout, source = rows[0]

    match step.primitive:
        case "reshape":
            return _reshaped(layout, source, shape)
        case "dot_general":
            return _product(params["dimension_numbers"], rows, operands)
        case "slice" | "pad" if any(source[d] != shape[d] for d in layout.axes):
            return _moved(step, layout, shape)
        case "slice" | "pad" | "dynamic_slice" | "split" | "top_k":
            kept = len(shape) == len(source) and all(source[d] == shape[d] for d in layout.axes)
            return layout if i == 0 and kept else None
        case "concatenate":
            return layout if params["dimension"] not in layout.axes else None
        case "gather" | "rev" | "scan" | "while" | "cond" | "dot" | "conv_general_dilated":
            return None
        case name if name.startswith(("reduce_", "arg")) and "axes" in params:
            return _reduced(layout, source, params["axes"])
        case _ if (where := _axes(step, len(source), len(shape))) is not None:
            return _on(layout, source, where)
        case _:
            # Elementwise, sorts, cumulative sums, updates in place.
            same = [x for _, x, s in rows if s == shape]
            return same[0] if same else None


def _told_of_tiles(
    step: Step, operands: Sequence[tuple[Layout, tuple[int, ...]]], shape: tuple[int, ...]
) -> Tiles | None:
    """As `_told`, where no operand has rows."""
    tiles = [(x, s) for x, s in operands if isinstance(x, Tiles)]
    if not tiles:
        return None
    layout, source = tiles[0]
    if (where := _axes(step, len(source), len(shape))) is not None:
        axis = where[layout.axis]
        return None if axis is None else dataclasses.replace(layout, axis=axis)
    single = step.primitive not in ("scan", "while", "cond", "gather", "rev", "reshape")
    return layout if single and source == shape else None


def _axes(step: Step, before: int, behind: int) -> list[int | None] | None:
    """Of a step that moves whole axes, where each of its operand's is; None: another step."""
    params = step.params
    match step.primitive:
        case "transpose":
            return [list(params["permutation"]).index(d) for d in range(before)]
        case "broadcast_in_dim":
            return list(params["broadcast_dimensions"])
        case "squeeze":
            gone = {d % before for d in params["dimensions"]}
            kept = [d for d in range(before) if d not in gone]
            return [kept.index(d) if d in kept else None for d in range(before)]
        case "expand_dims":
            return [d for d in range(behind) if d not in params["dimensions"]]
        case _:
            return None


def _on(layout: Rows, source: Sequence[int], where: Sequence[int | None]) -> Rows | None:
    """The layout with its axes moved to other places: side by side, in their order."""
    axes = [where[d] for d in layout.axes]
    if layout.span > 1 and (None in axes or axes != [*range(axes[0] or 0, (axes[-1] or 0) + 1)]):
        # An axis of one element may stand anywhere.
        axes = [where[d] for d in layout.axes if source[d] != 1]
    if not axes or axes[0] is None or axes != [*range(axes[0], axes[0] + len(axes))]:
        return None
    return dataclasses.replace(layout, axis=axes[0], span=len(axes))


def _reduced(layout: Rows, source: Sequence[int], gone: Sequence[int]) -> Layout | None:
    """What a reduction over these axes leaves of the rows."""
    if set(layout.axes) <= set(gone):
        return SHARED
    before = sum(d < layout.axis for d in gone)
    over = [d for d in layout.axes if d in gone]
    if not over:
        return dataclasses.replace(layout, axis=layout.axis - before)
    if over == [*layout.axes][1:] and layout.major * layout.minor == 1:
        height = math.prod(source[d] for d in over)
        return Tiles(layout.axis - before, height, layout.offset)
    return None


def _reshaped(layout: Rows, source: tuple[int, ...], shape: tuple[int, ...]) -> Rows | None:
    """The batch is a digit of the elements' count in C order: on the axes that hold it whole."""
    one = dataclasses.replace(layout, span=1), layout.merged(source)
    for span in range(1, len(shape) + 1):
        for axis in reversed(range(len(shape) - span + 1)):
            if found := _held(*one, merged(shape, axis, span), axis):
                # Tiles of which there is one here may be several at another size.
                while axis and shape[axis - 1] == 1 and found.major * found.minor == 1:
                    axis, span = axis - 1, span + 1
                return dataclasses.replace(found, axis=axis, span=span)
    return None


def _held(layout: Rows, source: Sequence[int], shape: Sequence[int], axis: int) -> Rows | None:
    """The layout on this axis of a reshaped value; None where it does not hold the batch."""
    behind = math.prod(source[layout.axis + 1 :])
    stride, offset = layout.minor * behind, layout.offset * behind
    padded = not layout.fills(source)
    if padded and (layout.major > 1 or math.prod(source[: layout.axis]) > 1):
        return None
    size, inner = shape[axis], math.prod(shape[axis + 1 :])
    reach = inner * size
    if padded:
        whole = math.prod(shape[:axis]) == 1 and offset + stride * layout.extent <= reach
    else:
        whole = reach % (stride * layout.extent) == 0
    if not whole or stride % inner or offset % inner:
        return None
    minor = stride // inner
    major = 1 if padded else size // (minor * layout.extent)
    return Rows(axis, layout.extent, major, minor, offset // inner)


def _moved(step: Step, layout: Rows, shape: tuple[int, ...]) -> Rows | None:
    """A batch axis cut or padded: the rows keep their order and begin elsewhere."""
    if layout.span > 1:
        return None
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
        if set(layout.axes) <= set(contracted):
            return SHARED
        shared = [d for d in layout.axes if d in batch]
        if len(rows) > 1 and not shared:
            return None
        free = [d for d in range(len(shape)) if d not in (*contracted, *batch)]
        before = len(batch)
        if side == 1:
            before += len(operands[0][1]) - len(left) - len(left_batch)
        where = [
            batch.index(d) if d in batch else before + free.index(d) if d in free else None
            for d in range(len(shape))
        ]
        return _on(layout, shape, where)
    return None
