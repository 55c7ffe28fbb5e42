"""Two programs evaluated side by side, a step at a time, up to the first that differs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdet.certify.program import Step, align
from jdet.certify.rows import SHARED, Rows
from jdet.certify.sides import RECUT, SAME, UNTOLD, Side, compare
from jdet.testing.bits import Difference, host

# What moves elements and changes none: a batch size that needs no padding has one step less.
_MOVES = """broadcast_in_dim concatenate copy expand_dims pad reshape rev slice squeeze
    transpose""".split()


@dataclasses.dataclass(frozen=True)
class Found:
    """The first step whose results differ between two runs.

    Attributes:
      steps: it, in run a and in run b (None: that run has no such step).
      kind: "operation", "between", "made", "mixing", "recut" or "program", as in `Bisection`.
      output: which of its outputs.
      difference: of the row, or of the shared value.
      path: the loops and branches that it stands in.
      reaches: where a shared or recut value first changes the row's bits.
      unread: steps that lead to it and whose results could not be compared.
      values: the numbers, in both of the outermost programs, of the value that differs.
    """

    steps: tuple[Step | None, Step | None]
    kind: str
    output: int = 0
    difference: Difference | None = None
    path: tuple[str, ...] = ()
    reaches: Step | None = None
    unread: tuple[Step, ...] = ()
    values: tuple[int, int] | None = None


class Alone:
    """Runs single steps, each compiled by itself; equal steps on equal shapes are compiled once."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        self.options = options
        self._compiled: dict[Any, Callable[..., Any]] = {}
        # Keys may hold ids of steps, so these must live.
        self._kept: list[Any] = []

    def __call__(self, step: Step, values: dict[int, Any], constants: dict[int, Any]) -> list[Any]:
        """The step's outputs on the values given; scalars of the program stay constants."""
        fixed = {
            place: constants[i]
            for place, i in enumerate(step.inputs)
            if np.size(constants.get(i, ())) == 1
        }
        given = [place for place in range(len(step.inputs)) if place not in fixed]
        key = self._key(step, fixed)
        if key not in self._compiled:

            def run(*inputs: Any) -> list[Any]:
                known = {**fixed, **dict(zip(given, inputs, strict=True))}
                return step.bind(*(known[place] for place in range(len(step.inputs))))

            self._compiled[key] = jax.jit(run, compiler_options=self.options)
        return list(self._compiled[key](*(values[step.inputs[place]] for place in given)))

    def _key(self, step: Step, fixed: dict[int, Any]) -> Any:
        self._kept.append(step)
        numbers = tuple(
            (place, str(host(x).dtype), getattr(x, "weak_type", None), host(x).tobytes())
            for place, x in fixed.items()
        )
        try:
            params = frozenset(step.params.items())
        except TypeError:
            # A parameter that cannot be hashed: the step is its own only like.
            params = id(step)
        return step.primitive, params, numbers

    def body(self, side: Side, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of a whole program, its steps compiled one by one."""
        constants = side.program.constants
        values = {**constants, **dict(zip(side.program.inputs, inputs, strict=True))}
        for step in side.program.steps:
            values.update(zip(step.outputs, self(step, values, constants), strict=True))
        return [values[i] for i in side.program.outputs]


# Of several causes the lowest is told: (to be told last, the step's number).
type Rank = tuple[bool, int]


@dataclasses.dataclass
class _Track:
    """One side of a walk: its values, and what is known of them.

    Attributes:
      values: those still needed.
      cause: of a value that differs or may, the first step that made it so, ranked.
      dark: of a value that could not be compared, the steps since the last ones that could.
    """

    side: Side
    values: dict[int, Any]
    cause: dict[int, tuple[Rank, Found]]
    dark: dict[int, tuple[Step, ...]]
    last: dict[int, Step]

    def drop(self, step: Step) -> None:
        """Forgets the values that this step read last."""
        for i in step.inputs:
            if self.last[i] is step and i not in self.side.program.outputs:
                self.values.pop(i, None)


# Enters a loop or branch that differs: the first difference inside, or None.
type Enter = Callable[["Walk", Step, Step], Found | None]


class Walk:
    """Two programs evaluated side by side.

    Attributes:
      untold: steps with a result that could not be compared.
      found: an operation that differs, where nothing before it does: the walk ends there.
    """

    def __init__(
        self,
        sides: tuple[Side, Side],
        inputs: tuple[Sequence[Any], Sequence[Any]],
        alone: Alone,
        enter: Enter,
    ) -> None:
        self.alone, self.enter = alone, enter
        self.untold: list[Step] = []
        self.found: Found | None = None
        self.tracks = [
            _Track(
                side,
                {**side.program.constants, **dict(zip(side.program.inputs, given, strict=True))},
                {},
                {},
                {i: step for step in side.program.steps for i in step.inputs},
            )
            for side, given in zip(sides, inputs, strict=True)
        ]

    def run(self) -> Found | None:
        """The first step whose difference reaches a result's row; None where none does."""
        a, b = (t.side.program for t in self.tracks)
        for number, (one, two) in enumerate(align(a, b)):
            for track, step in zip(self.tracks, (one, two), strict=True):
                if step is not None:
                    made = self.alone(step, track.values, track.side.program.constants)
                    track.values.update(zip(step.outputs, made, strict=True))
            if one is not None and two is not None:
                self._pair(number, one, two)
                if self.found:
                    return self.found
            else:
                self._single(number, one, two)
            for track, step in zip(self.tracks, (one, two), strict=True):
                if step is not None:
                    track.drop(step)
        return self._end()

    def _end(self) -> Found | None:
        """The earliest cause of a difference in the results."""
        a, b = self.tracks
        causes: list[tuple[Rank, Found]] = []
        for number, values in enumerate(
            zip(a.side.program.outputs, b.side.program.outputs, strict=True)
        ):
            if a.side.results and not isinstance(a.side.results[number], Rows):
                continue
            state = compare(a.side, b.side, values, a.values[values[0]], b.values[values[1]])
            if state == SAME:
                continue
            known = [t.cause[i] for t, i in zip(self.tracks, values, strict=True) if i in t.cause]
            causes += known
            dark = [s for t, i in zip(self.tracks, values, strict=True) for s in t.dark.get(i, ())]
            if isinstance(state, Difference) and dark and not known:
                # No step of both runs shows it: it came in where the rows were not found.
                unread = tuple(dict.fromkeys(dark[:-1]))
                found = Found((dark[-1], dark[-1]), "between", 0, state, (), None, unread, values)
                causes.append(((False, len(a.side.program.steps)), found))
        return min(causes, key=_rank)[1] if causes else None

    def _only(self) -> bool:
        """No earlier difference may still reach the results."""
        return all(rank[0] for track in self.tracks for rank, _ in track.cause.values())

    def _inherited(
        self, steps: tuple[Step | None, Step | None]
    ) -> tuple[tuple[Rank, Found] | None, tuple[Step, ...]]:
        """(the earliest cause, the dark steps) behind what these steps read."""
        causes, dark = [], []
        for track, step in zip(self.tracks, steps, strict=True):
            for i in step.inputs if step else ():
                if i in track.cause:
                    causes.append(track.cause[i])
                dark += track.dark.get(i, ())
        return min(causes, key=_rank, default=None), tuple(dict.fromkeys(dark))

    def _single(self, number: int, one: Step | None, two: Step | None) -> None:
        """A step that one run has and the other has not."""
        cause, dark = self._inherited((one, two))
        step = one or two
        assert step is not None
        if cause is None and step.primitive not in _MOVES:
            cause = (False, number), Found((one, two), "program", unread=dark)
        track = self.tracks[0 if one else 1]
        for value in step.outputs:
            if cause:
                track.cause[value] = cause
            if dark:
                track.dark[value] = dark

    def _pair(self, number: int, one: Step, two: Step) -> None:
        cause, dark = self._inherited((one, two))
        a, b = self.tracks
        for output, values in enumerate(zip(one.outputs, two.outputs, strict=True)):
            arrays = a.values[values[0]], b.values[values[1]]
            state = compare(a.side, b.side, values, *arrays)
            if state == SAME:
                continue
            difference = state if isinstance(state, Difference) else None
            found = Found((one, two), "", output, difference, unread=dark, values=values)
            why = cause
            if state == UNTOLD:
                self.untold.append(one)
                a.dark[values[0]] = b.dark[values[1]] = (*dark, one)
            elif state == RECUT or not isinstance(a.side.layouts[values[0]], Rows):
                kind = "recut" if state == RECUT else "mixing"
                why = cause or ((False, number), dataclasses.replace(found, kind=kind))
            elif cause is None:
                rows = any(a.side.layouts[i] is not SHARED for i in one.inputs)
                kind = "between" if dark else "operation" if rows else "made"
                inside = self.enter(self, one, two) or dataclasses.replace(found, kind=kind)
                # A row's own number differs by its nature, and picks the row out of arrays.
                last = one.primitive == "iota"
                why = (last, number), dataclasses.replace(inside, values=values)
                if not last and inside.kind != "made" and self._only():
                    self.found = why[1]
            elif cause[1].kind not in ("operation", "between") and cause[1].reaches is None:
                why = cause[0], dataclasses.replace(cause[1], reaches=one)
            if why:
                a.cause[values[0]] = b.cause[values[1]] = why


def _rank(cause: tuple[Rank, Found]) -> Rank:
    return cause[0]
