"""The first operation whose bits differ between two runs that should agree in one row."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jdet.certify.in_program import InProgram, first_result
from jdet.certify.loops import enter
from jdet.certify.program import Step
from jdet.certify.rows import SHARED, UNKNOWN, Layout, Rows
from jdet.certify.sides import Side, axes_of, make_side
from jdet.certify.walk import Alone, Found, Walk
from jdet.testing.bits import Difference, first_difference

_SAID = {
    "none": "the rows agree in every bit",
    "operation": "the operation gives other bits when it runs alone, on equal inputs",
    "between": (
        "either this operation or one of those listed below, whose rows were not found, gives "
        "other bits when it runs alone"
    ),
    "made": (
        "the operation makes rows of what all rows share (one random key, say): the row's "
        "place and the batch's size decide its bits"
    ),
    "mixing": "the operation makes one value of several rows, and it reaches the row",
    "recut": "the operation gives the row another shape: how it is cut follows the batch",
    "program": "one run has this operation and the other has not",
    "fusion": (
        "only inside the whole compiled program (fusion context): run alone on equal inputs, "
        "every operation gives equal bits"
    ),
    "unlocated": (
        "only inside the whole compiled program (fusion context), and every output added to "
        "look at it hides the difference"
    ),
}


@dataclasses.dataclass(frozen=True)
class Bisection:
    """What `bisect` found; `str()` tells it.

    Attributes:
      kind: "none": the rows agree. "operation": differs when run alone on equal inputs.
        "between": that too, or one of the steps in `unread` before it.
        "made": rows made of shared values, such as one key for the batch.
        "mixing": a value without a batch axis, which reaches the row. "recut": the row's shape
        follows the batch. "program": a step that one run's trace has and
        the other's has not. "fusion": only in
        the whole compiled program. "unlocated": that too, and hidden by looking.
      primitive, source: of the operation, in run a; "" where none was found.
      shapes: of its output in run a and in run b; () in a run that has no such step.
      dtype: of that output.
      difference: of the row there (of the whole of a shared value): bits, ULPs, share.
      in_program: with its output added to the compiled program it "differs", "agrees", the
        difference of the results is "hidden" by adding it, or "" (not asked).
      path: the loops and branches it stands in.
      reaches: "mixing" and "recut": where the row's bits change first.
      unread: steps that lead to it and whose rows were not found in their results.
      skipped: all steps up to it whose results were not compared, for that reason.
      hidden: steps whose output, added to the compiled program, hides the difference.
      result: the difference of the results, that of the first output that has one.
    """

    kind: str
    primitive: str = ""
    source: str = ""
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    dtype: str = ""
    difference: Difference | None = None
    in_program: str = ""
    path: tuple[str, ...] = ()
    reaches: str = ""
    unread: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    result: Difference | None = None

    def __str__(self) -> str:
        if self.kind in ("none", "unlocated"):
            lines = [_SAID[self.kind]]
        else:
            a, b = ("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
            lines = [f"{self.primitive} at {self.source}: {_SAID[self.kind]}"]
            lines.append(f"  output {self.dtype} {a} in run a, {b} in run b")
        lines += [f"  in {place}" for place in self.path]
        if self.difference:
            d = self.difference
            lines.append(f"  {d}: {100 * d.share:.3g} % of the row")
        if self.reaches:
            lines.append(f"  reaches the row in {self.reaches}")
        told = {
            "differs": "with its output added to the compiled program it differs there too",
            "agrees": "with its output added to the compiled program it agrees there",
            "hidden": "adding its output to the compiled program hides the difference",
        }
        if self.in_program:
            lines.append(f"  {told[self.in_program]}")
        if self.unread:
            lines.append(f"  before it, uncompared: {', '.join(self.unread)}")
        if self.hidden:
            lines.append(f"  hidden by adding the output of: {', '.join(self.hidden)}")
        if self.skipped:
            lines.append(f"  {len(self.skipped)} earlier steps not compared, their rows unknown")
        if self.result:
            lines.append(f"  the results: {self.result}")
        return "\n".join(lines)


def bisect(
    fn: Callable[..., Any],
    args_a: Sequence[Any],
    args_b: Sequence[Any],
    row_a: int,
    row_b: int,
    *,
    batch_axes: Any = 0,
    out_axes: Any = 0,
    compiler_options: dict[str, Any] | None = None,
) -> Bisection:
    """Where row `row_a` of fn(*args_a) and row `row_b` of fn(*args_b) get other bits.

    The rows are those of one request in two batches. Both runs are traced, calls are inlined,
    and the steps are run one at a time, each compiled alone; loops and branches are entered
    when they differ, kernels (Pallas and other custom calls) are not. Then outputs are added to
    the whole compiled program, to tell an operation that differs by itself from one that
    differs by what it is compiled with.

    Args:
      fn: a function of arrays, or a jitted one (then give its compiler options here too).
      batch_axes: the batch axis of each argument, as in_axes of `jax.vmap`: None for what all
        rows share, which must be the same in both runs.
      out_axes: likewise of the result.
      compiler_options: for every compile.

    Raises:
      ValueError: fn cannot be traced, the axes fit no batch, or the two requests are not
        the same one.
    """
    arguments = tuple(args_a), tuple(args_b)
    axes = [axes_of(batch_axes, x, "batch_axes") for x in arguments]
    made = [
        make_side(fn, x, axis, row, name)
        for x, axis, row, name in zip(arguments, axes, (row_a, row_b), "ab", strict=True)
    ]
    a, b = (_with_outputs(side, out, out_axes) for side, out in made)
    leaves = jax.tree.leaves(arguments[0]), jax.tree.leaves(arguments[1])
    _check_same_request(a, b, leaves)
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn, compiler_options=compiler_options)
    results = [jax.tree.leaves(jitted(*x)) for x in arguments]
    result = first_result(a, b, results)
    if result is None:
        return Bisection("none")
    walk = Walk((a, b), leaves, Alone(compiler_options), enter)
    found = walk.run()
    skipped = tuple(_named(step) for step in dict.fromkeys(walk.untold))
    whole = InProgram(a, b, leaves, compiler_options)
    if found is not None:
        asked = whole.ask(found)
        if asked != "agrees" or found.kind not in ("operation", "between"):
            return _told(found, asked, skipped, result)
    located, hiding = whole.first()
    hidden = tuple(_named(step) for step in hiding)
    if located is None:
        return Bisection("unlocated", skipped=skipped, hidden=hidden, result=result)
    told = _told(located, "differs", skipped, result)
    return dataclasses.replace(told, hidden=hidden)


def _with_outputs(side: Side, out: Any, out_axes: Any) -> Side:
    """The side with the layouts of its results as the caller states them."""
    results: list[Layout] = []
    for shape, axis in zip(jax.tree.leaves(out), axes_of(out_axes, out, "out_axes"), strict=True):
        if axis is None:
            results.append(SHARED)
            continue
        ndim = len(shape.shape)
        if not -ndim <= axis < ndim or shape.shape[axis] != side.size:
            raise ValueError(
                f"out_axes: axis {axis} of a result of shape {shape.shape} does not hold "
                f"the batch's {side.size} rows"
            )
        results.append(Rows(axis % ndim, side.size))
    found = dict(side.layouts)
    for value, layout in zip(side.program.outputs, results, strict=True):
        if found[value] is UNKNOWN:
            found[value] = layout
    return dataclasses.replace(side, layouts=found, results=tuple(results))


def _check_same_request(a: Side, b: Side, leaves: tuple[Sequence[Any], Sequence[Any]]) -> None:
    if len(leaves[0]) != len(leaves[1]):
        raise ValueError(f"{len(leaves[0])} arrays in args_a and {len(leaves[1])} in args_b")
    for number, value in enumerate(a.program.inputs):
        one, two = a.read(value, leaves[0][number]), b.read(value, leaves[1][number])
        assert one is not None and two is not None
        # Another shape is another padding, which the function may well allow.
        if one.shape == two.shape and (found := first_difference(one, two)):
            what = "the row" if isinstance(a.layouts[value], Rows) else "what all rows share"
            raise ValueError(f"array {number} of the arguments: {what} differs, {found}")


def _told(found: Found, in_program: str, skipped: tuple[str, ...], result: Difference) -> Bisection:
    one, two = found.steps
    step = one or two
    assert step is not None
    return Bisection(
        kind=found.kind,
        primitive=_pair(one, two, "primitive"),
        source=_pair(one, two, "source"),
        shapes=(
            one.shapes[found.output] if one else (),
            two.shapes[found.output] if two else (),
        ),
        dtype=step.dtypes[found.output],
        difference=found.difference,
        in_program=in_program,
        path=found.path,
        reaches=_named(found.reaches) if found.reaches else "",
        unread=tuple(_named(s) for s in found.unread),
        skipped=skipped,
        result=result,
    )


def _pair(one: Step | None, two: Step | None, name: str) -> str:
    """An attribute of both, once where it is the same."""
    values = [getattr(s, name) if s else "(no such step)" for s in (one, two)]
    return values[0] if values[0] == values[1] else f"{values[0]} | {values[1]}"


def _named(step: Step) -> str:
    return f"{step.primitive} at {step.source}"
