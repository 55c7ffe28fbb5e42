"""What ran, counted: into the results of the guarantees, and for the map of the report."""

import collections
from collections.abc import Collection

from jdet.certify.certificate import Certificate, Result
from jdet.certify.runs import Ran


class Tally:
    """The sets behind a certificate's numbers."""

    def __init__(self) -> None:
        self._heat: collections.Counter[tuple[int, int, bool]] = collections.Counter()
        self._cuts: dict[str, set[tuple[int, ...]]] = collections.defaultdict(set)
        self._batches: dict[str, set[int]] = collections.defaultdict(set)

    def count(self, result: Result, ran: Ran, occurred: Collection[int]) -> None:
        """A trial of a guarantee; `occurred`: the requests around which its subject occurred."""
        name = result.name
        result.trials += 1
        wrong = {m.request for m in ran.mismatches}
        for i, (sent, seen) in enumerate(zip(ran.case.requests, ran.seen, strict=True)):
            result.comparisons += 1
            result.occurred += i in occurred
            result.mismatches += i in wrong
            result.hits += seen.reused > 0
            result.preemptions += seen.preempted
            length = len(sent.prompt)
            result.rows = wider(result.rows, seen.rows)
            result.lengths = wider(result.lengths, length)
            self._cuts[name].add((length, *seen.starts))
            self._heat[seen.rows, length, i in wrong] += 1
        result.cuts = len(self._cuts[name])
        self._batches[name] |= {b.key for b in ran.batches if not b.requests.isdisjoint(occurred)}
        result.compositions = len(self._batches[name])

    def finish(self, certificate: Certificate) -> None:
        """Fill in what is counted over all guarantees."""
        certificate.compositions = len(set().union(*self._batches.values()))
        certificate.heat = [
            [rows, length, self._heat[rows, length, False] + wrong, wrong]
            for rows, length in sorted({key[:2] for key in self._heat})
            for wrong in [self._heat[rows, length, True]]
        ]


def wider(pair: tuple[int, int] | None, value: int) -> tuple[int, int]:
    """The smallest and the largest, of these and one more."""
    low, high = pair or (value, value)
    return min(low, value), max(high, value)
