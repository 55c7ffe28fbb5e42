"""Rotary frequencies of the published rope types, and their tables."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

type RopeType = Literal["default", "linear", "llama3", "divided"]
ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """By what angle a position turns each pair of a head.

    Attributes:
      theta: the base: pair i of a head of D turns by theta**(-2 i / D) a position.
      kind: `default`; `linear` (every frequency divided by `factor`, Chen et al.,
        arXiv:2306.15595); `llama3` (low frequencies divided by `factor`, high ones kept, those
        between interpolated: Llama 3.1, and transformers' modeling_rope_utils.py); `divided`
        (each frequency by its own of `divisors`, as GGUF files store a scaling).
      factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: as in
        config.json.
      divisors: D / 2 numbers.
    """

    theta: float
    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    divisors: tuple[float, ...] = ()

    def frequencies(self, head_dim: int) -> np.ndarray:
        """[D/2] float64.

        Raises:
          ValueError: `divisors` for another head size.
        """
        half = head_dim // 2
        plain = self.theta ** (-np.arange(half, dtype=np.float64) / half)
        if self.kind == "divided":
            if len(self.divisors) != half:
                raise ValueError(f"{len(self.divisors)} rope divisors for heads of {head_dim}")
            return plain / np.array(self.divisors)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            turns = self.original_max_position_embeddings * plain / (2 * math.pi)
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return plain * (kept + (1 - kept) / self.factor)
        return plain

    def table(self, head_dim: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin) of every position and frequency, [P, D/2], float32 from float64."""
        angle = np.arange(positions, dtype=np.float64)[:, None] * self.frequencies(head_dim)
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def read_rope(settings: Mapping[str, Any], theta: Any, max_positions: int) -> Rope:
    """One rope's settings, as `rope_scaling` or `rope_parameters` of a config.json has them.

    `theta` and `max_positions` stand in for what the settings do not say.

    Raises:
      ValueError: a type that is not supported, or a number that is missing or out of range.
    """
    kind = settings.get("rope_type", settings.get("type", "default"))
    if settings.get("partial_rotary_factor", 1) != 1:
        raise ValueError("rope over a part of the head is not supported")
    theta = _number(settings, "rope_theta", theta)
    if kind == "default":
        return Rope(theta)
    if kind == "divided":
        return Rope(theta, "divided", divisors=tuple(settings["divisors"]))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    factor = _number(settings, "factor")
    if kind == "linear":
        return Rope(theta, "linear", factor)
    low, high = (_number(settings, f"{name}_freq_factor") for name in ("low", "high"))
    if high <= low:
        raise ValueError(f"rope has high_freq_factor={high}; must be above low_freq_factor={low}")
    original = _number(settings, "original_max_position_embeddings", max_positions)
    return Rope(theta, "llama3", factor, low, high, int(original))


def _number(settings: Mapping[str, Any], key: str, default: Any = None) -> float:
    value = settings.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"rope has {key}={value!r}; expected a positive number")
    return float(value)
