"""The smallest composition that still fails: fewest mates, then shortest prompts.

Greedy removal in halves and then one by one, as in delta debugging (Zeller & Hildebrandt,
"Simplifying and Isolating Failure-Inducing Input", 2002).
"""

import dataclasses
from collections.abc import Callable, Iterator

from jdet.certify.cases import Case, Sent


def shrink(
    case: Case, request: int, fails: Callable[[Case, int], bool], more: Callable[[], bool]
) -> tuple[Case, int, int]:
    """(the smallest case found, the request's place in it, cases that were tried).

    Args:
      fails: whether the request at this place of a case has other bits than alone.
      more: whether there is time for another try.
    """
    tried = 0
    simpler = True
    while simpler:
        simpler = False
        for smaller, place in _simpler(case, request):
            if not more():
                return case, request, tried
            tried += 1
            if fails(smaller, place):
                case, request, simpler = smaller, place, True
                break
    return case, request, tried


def _simpler(case: Case, request: int) -> Iterator[tuple[Case, int]]:
    """Cases with less in them, the ones with the least first."""
    mates = [i for i in range(len(case.requests)) if i != request]
    size = len(mates)
    while size:
        for at in range(0, len(mates), size):
            gone = set(mates[at : at + size])
            kept = [i for i in range(len(case.requests)) if i not in gone]
            sent = tuple(case.requests[i] for i in kept)
            yield dataclasses.replace(case, requests=sent), kept.index(request)
        size //= 2
    if case.front == "engine" and any(s.arrive for s in case.requests):
        at_once = tuple(dataclasses.replace(s, arrive=0) for s in case.requests)
        yield dataclasses.replace(case, requests=at_once), request
    # The request's own prompt last: each of its lengths asks for another run alone.
    for i in (*mates, request):
        for sent in _shorter(case.requests[i]):
            requests = (*case.requests[:i], sent, *case.requests[i + 1 :])
            yield dataclasses.replace(case, requests=requests), request


def _shorter(sent: Sent) -> Iterator[Sent]:
    """The prompt's beginning: one token, a half of it, all but its last."""
    length = len(sent.prompt)
    if sent.read:  # what was generated must stay
        return
    for count in dict.fromkeys((1, length // 2, length - 1)):
        if 0 < count < length:
            yield dataclasses.replace(sent, prompt=sent.prompt[:count])
