"""The batches that were formed, told apart: what `certify` counts as compositions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jdet.certify.cases import Case
from jdet.engine.request import Request
from jdet.engine.scheduler import Plan


class Batch(NamedTuple):
    """What one step computed.

    Attributes:
      key: of its padded shape, which requests stood in which rows, which parts of prompts were
        read, and whether their beginnings came from the prefix cache. Steps that differ only in
        how far the generating rows are have one key.
      requests: the case's requests in it.
    """

    key: int
    requests: frozenset[int]


def of_call(case: Case) -> list[Batch]:
    """Of a call that shows no steps: one batch."""
    key = hash((case.front, tuple((s.prompt, s.sampling) for s in case.requests)))
    return [Batch(key, frozenset(range(len(case.requests))))]


def of_steps(plans: Sequence[Plan], places: Mapping[Request, int]) -> list[Batch]:
    """The batch of every step."""
    names = {request: hash((tuple(request.prompt), request.params)) for request in places}
    reused: dict[Request, bool] = {}
    found = []
    for plan in plans:
        for c in plan.chunks:
            reused.setdefault(c.request, c.start > 0)
        key = (
            (*plan.chunk_shape, plan.decode_rows),
            tuple((names[c.request], c.start, c.length, reused[c.request]) for c in plan.chunks),
            tuple(names[c.request] for c in plan.decodes),
        )
        requests = frozenset(places[c.request] for c in (*plan.chunks, *plan.decodes))
        found.append(Batch(hash(key), requests))
    return found
