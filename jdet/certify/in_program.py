"""Two whole compiled programs, with outputs added to see where they part."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jdet.certify.program import Step, align
from jdet.certify.rows import Rows
from jdet.certify.sides import RECUT, Comparison, Side, compare
from jdet.certify.walk import Found
from jdet.testing.bits import Difference, first_difference

# Outputs that may hide the difference before the search gives up; each costs two compiles.
_HIDDEN = 16


class InProgram:
    """The two runs as whole compiled programs, with outputs added to look inside."""

    def __init__(
        self,
        a: Side,
        b: Side,
        leaves: tuple[Sequence[Any], Sequence[Any]],
        options: dict[str, Any] | None,
    ) -> None:
        self.a, self.b, self.leaves, self.options = a, b, leaves, options

    def look(self, pairs: Sequence[tuple[int, int]]) -> tuple[bool, list[Comparison]]:
        """(whether the results still differ, a comparison of each pair) with these added."""

        def run(side: Side, added: Sequence[int], *inputs: Any) -> list[Any]:
            every = side.program.run(inputs)
            return [every[i] for i in (*side.program.outputs, *added)]

        one, two = (
            jax.jit(functools.partial(run, side, added), compiler_options=self.options)(*given)
            for side, given, added in zip(
                (self.a, self.b), self.leaves, ([p[i] for p in pairs] for i in (0, 1)), strict=True
            )
        )
        count = len(self.a.program.outputs)
        differ = first_result(self.a, self.b, (one[:count], two[:count])) is not None
        seen = [
            compare(self.a, self.b, pair, x, y)
            for pair, x, y in zip(pairs, one[count:], two[count:], strict=True)
        ]
        return differ, seen

    def ask(self, found: Found) -> str:
        """Whether what was found differs in the program as well; "" where it cannot be added."""
        if found.values is None:
            return ""
        differ, [seen] = self.look([found.values])
        if isinstance(seen, Difference) or seen == RECUT:
            return "differs"
        return "agrees" if differ else "hidden"

    def first(self) -> tuple[Found | None, list[Step]]:
        """(the first step whose rows differ, those that hide the difference), by halving."""
        candidates = list(self._candidates())
        if not candidates:
            return None, []
        pairs, steps = zip(*candidates, strict=True)
        differ, seen = self.look(pairs)
        if differ:
            # Compiled with one output added it need not be as with all: looked at alone.
            for pair, found, state in zip(pairs, steps, seen, strict=True):
                if isinstance(state, Difference):
                    _, [alone] = self.look([pair])
                    if isinstance(alone, Difference):
                        return dataclasses.replace(found, difference=alone), []
                    break
        low, high = 0, len(steps)
        best: Found | None = None
        hidden: list[int] = []
        while low < high:
            left = [i for i in range(low, high) if i not in hidden]
            if not left:
                break
            middle = left[len(left) // 2]
            differ, [state] = self.look([pairs[middle]])
            if isinstance(state, Difference):
                high, best = middle, dataclasses.replace(steps[middle], difference=state)
            elif differ:
                low = middle + 1
            else:
                hidden.append(middle)
                if len(hidden) > _HIDDEN:
                    break
        return best, [step for i in hidden if (step := steps[i].steps[0])]

    def _candidates(self) -> Iterator[tuple[tuple[int, int], Found]]:
        """Every step of both runs with rows in an output."""
        for one, two in align(self.a.program, self.b.program):
            if one is None or two is None:
                continue
            for number, values in enumerate(zip(one.outputs, two.outputs, strict=True)):
                sides = zip((self.a, self.b), values, strict=True)
                if all(isinstance(side.layouts[value], Rows) for side, value in sides):
                    yield values, Found((one, two), "fusion", number)
                    break


def first_result(a: Side, b: Side, results: Sequence[Sequence[Any]]) -> Difference | None:
    """The first difference between the rows of the results; one without rows is not compared."""
    for one, two, x, y in zip(a.results, b.results, *results, strict=True):
        if not isinstance(one, Rows):
            continue
        x, y = a.part(one, x), b.part(two, y)
        if x.shape != y.shape:
            raise ValueError(f"the rows of a result have shapes {x.shape} and {y.shape}")
        if found := first_difference(x, y):
            return found
    return None
