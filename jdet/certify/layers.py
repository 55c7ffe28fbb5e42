"""Where in a model a composition changes a request: its keys and values, layer by layer."""

import dataclasses
from typing import Any

import numpy as np

from jdet.certify.cases import Case
from jdet.certify.runs import Bench
from jdet.testing.bits import bit_patterns, ulp_distance


@dataclasses.dataclass(frozen=True)
class Layers:
    """A request's keys and values as a case leaves them in the cache, against its run alone.

    What layer i holds there was computed from the hidden states after layer i - 1. Positions
    from the first one with another token on are not compared.

    Attributes:
      positions: how many were compared.
      ulps: of each layer, the largest distance of a key or value.
      share: of each layer, the elements that differ.
      first: of each layer, the first position that differs; None where none does.
    """

    positions: int
    ulps: tuple[float, ...]
    share: tuple[float, ...]
    first: tuple[int | None, ...]

    @property
    def first_layer(self) -> int | None:
        """The first layer whose keys or values differ."""
        return next((i for i, at in enumerate(self.first) if at is not None), None)

    def __str__(self) -> str:
        at = self.first_layer
        if at is None:
            return (
                f"no key and no value of {len(self.ulps)} layers differs at {self.positions} "
                "positions: the last layer, the head or the sampler"
            )
        before = "the embedding" if at == 0 else f"layer {at - 1}"
        return (
            f"keys or values of layer {at} are the first to differ, at position "
            f"{self.first[at]}, by up to {self.ulps[at]:.3g} ULP: {before} or their own projection"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, and what they say."""
        return {**dataclasses.asdict(self), "said": str(self)}


def layers_of(bench: Bench, case: Case, request: int) -> Layers | None:
    """Run a case and the request alone once more, and compare what they leave in the cache.

    None where the case ends without it there (`Bench.cached`).
    """
    sent = case.requests[request]
    alone_case = Case("", 0, (dataclasses.replace(sent, arrive=0, cancel=None),))
    here, there = bench.cached(case, request), bench.cached(alone_case, 0)
    if here is None or there is None:
        return None
    (got, tokens), (alone, wanted) = here, there
    count = min(got[0][0].shape[1], alone[0][0].shape[1])
    # The generated tokens are in the cache too, and may be others here.
    pairs = enumerate(zip(tokens, wanted, strict=False))
    agreed = next((i for i, (a, b) in pairs if a != b), len(wanted))
    count = min(count, len(sent.prompt) + agreed)
    ulps, share, first = [], [], []
    for mine, other in zip(got, alone, strict=True):
        both = [(x[:, :count], y[:, :count]) for x, y in zip(mine, other, strict=True)]
        differ = np.stack([bit_patterns(x) != bit_patterns(y) for x, y in both])
        ulps.append(max(float(ulp_distance(x, y).max(initial=0)) for x, y in both))
        share.append(float(differ.mean()))
        at = np.nonzero(differ.any(axis=(0, 1, 3)))[0]
        first.append(int(at[0]) if at.size else None)
    return Layers(count, tuple(ulps), tuple(share), tuple(first))
