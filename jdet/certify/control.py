"""The negative control: plain XLA is given compositions too, and must differ."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from jdet.certify.cases import SHORT, Case, engine_config
from jdet.certify.runs import Bench

# Compositions that plain XLA is given; it seldom needs more than one to differ.
_MOST, _FEWEST = 12, 2


def control_cases(batch: int, make: Callable[[int], Case]) -> Iterator[Case]:
    """Those of `make(0)`, `make(1)`, ... that are read in one step: few programs to compile."""
    rows = (engine_config(batch, prefix_caching=False).chunk_rows or (1,))[-1]
    for index in itertools.count():
        case = make(index)
        short = all(len(s.prompt) <= SHORT[-1] for s in case.requests)
        if short and len(case.requests) <= rows:
            yield case


def control(
    plain: Bench, cases: Iterator[Case], seconds: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """What plain XLA did, as plain values: how many of how many requests have other bits."""
    end = time.monotonic() + seconds
    ran = differ = compared = different = 0
    largest: int | None = None
    for case in itertools.islice(cases, _MOST):
        if ran >= _FEWEST and time.monotonic() > end:
            break
        tell(f"plain XLA: {ran}, {differ} differ")
        found = plain.run(case)
        ran += 1
        differ += bool(found.mismatches)
        compared += len(found.seen)
        different += len(found.mismatches)
        ulps = [m.ulps for m in found.mismatches if m.ulps is not None]
        largest = max([*ulps, largest or 0]) if ulps else largest
    said = f"{different} of {compared} requests have other bits, in {differ} of {ran} batches"
    if not differ:
        said += ": these compositions could not have told"
    return {
        "verdict": "DIFFERS" if differ else "SILENT",
        "said": said,
        "trials": ran,
        "differ": differ,
        "comparisons": compared,
        "mismatches": different,
        "max_ulps": largest,
    }
