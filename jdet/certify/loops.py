"""The bodies of loops and branches, entered where a loop's or branch's result differs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jdet.certify.program import Step, closed
from jdet.certify.rows import UNKNOWN, Layout, NoRows
from jdet.certify.sides import Side
from jdet.certify.walk import Found, Walk

type Turn = tuple[str, tuple[Side, Side], tuple[Sequence[Any], Sequence[Any]]]


def enter(walk: Walk, one: Step, two: Step) -> Found | None:
    """The first difference in the bodies of these steps; None: in the whole of them only."""
    for path, sides, inputs in _Body(walk, (one, two)).turns():
        found = Walk(sides, inputs, walk.alone, enter).run()
        if found:
            return dataclasses.replace(found, path=(path, *found.path))
    return None


class _Body:
    """A loop or branch of both runs.

    Attributes:
      arguments: what both were given; the carried part moves on with the turns.
      layouts: of these.
    """

    def __init__(self, walk: Walk, steps: tuple[Step, Step]) -> None:
        self.walk, self.steps = walk, steps
        self.arguments = [
            [track.values[i] for i in step.inputs]
            for track, step in zip(walk.tracks, steps, strict=True)
        ]
        self.layouts = [
            [track.side.layouts[i] for i in step.inputs]
            for track, step in zip(walk.tracks, steps, strict=True)
        ]

    def turns(self) -> Iterator[Turn]:
        """Each time a body runs: where that is, the body in both runs, what it is given."""
        match self.steps[0].primitive:
            case "scan" if self.steps[0].params["length"] == self.steps[1].params["length"]:
                yield from self._scan()
            case "while":
                yield from self._while()
            case "cond":
                yield from self._cond()

    def _sides(self, role: str, part: slice | list[int], scanned: int | None = None) -> Any:
        made = []
        for track, step, layouts in zip(self.walk.tracks, self.steps, self.layouts, strict=True):
            given = layouts[part] if isinstance(part, slice) else [layouts[i] for i in part]
            if scanned is not None:
                given = [*given[:scanned], *map(_element, given[scanned:])]
            probe = track.side.twin(step)
            bodies = _bodies(step)[role], _bodies(probe or step)[role]
            made.append(track.side.inside(*bodies, given))
        return tuple(made)

    def _scan(self) -> Iterator[Turn]:
        params = self.steps[0].params
        constants, carried, _ = (len(list(part)) for part in params["ft_in"].unpack())
        first = constants + carried
        sides = self._sides("body", slice(None), scanned=first)
        order = range(params["length"])
        for i in reversed(order) if params["reverse"] else order:
            given = tuple([*x[:first], *(y[i] for y in x[first:])] for x in self.arguments)
            yield self._place(i), sides, (given[0], given[1])
            for x, now, side in zip(self.arguments, given, sides, strict=True):
                x[constants:first] = self.walk.alone.body(side, now)[:carried]

    def _while(self) -> Iterator[Turn]:
        params = self.steps[0].params
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        first = tests + bodies
        asked = [*range(tests), *range(first, len(self.arguments[0]))]
        conditions = self._sides("cond", asked)
        sides = self._sides("body", slice(tests, None))
        alone, turn = self.walk.alone, 0
        while all(
            bool(alone.body(side, [x[i] for i in asked])[0])
            for side, x in zip(conditions, self.arguments, strict=True)
        ):
            one, two = (x[tests:] for x in self.arguments)
            yield self._place(turn), sides, (one, two)
            for x, side in zip(self.arguments, sides, strict=True):
                x[first:] = alone.body(side, x[tests:])
            turn += 1

    def _cond(self) -> Iterator[Turn]:
        count = len(self.steps[0].params["branches"])
        chosen = {int(np.clip(int(x[0]), 0, count - 1)) for x in self.arguments}
        if len(chosen) == 1:
            [branch] = chosen
            one, two = (x[1:] for x in self.arguments)
            yield self._place(branch), self._sides(str(branch), slice(1, None)), (one, two)

    def _place(self, turn: int) -> str:
        return f"{self.steps[0].primitive}[{turn}] at {self.steps[0].source}"


def _bodies(step: Step) -> dict[str, core.ClosedJaxpr]:
    """What a loop or a branch holds, by role."""
    params = step.params
    match step.primitive:
        case "scan":
            return {"body": closed(params["jaxpr"])}
        case "while":
            return {"cond": closed(params["cond_jaxpr"]), "body": closed(params["body_jaxpr"])}
        case _:
            return {str(i): closed(branch) for i, branch in enumerate(params["branches"])}


def _element(layout: Layout) -> Layout:
    """Of what a scan's body sees of an array, its first axis taken off."""
    if isinstance(layout, NoRows):
        return layout
    if layout.axis == 0:
        # The loop walks over the rows: which turn is whose is not followed.
        return UNKNOWN
    return dataclasses.replace(layout, axis=layout.axis - 1)
