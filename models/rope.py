"""Rotary frequencies of the published rope types, and their tables."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

type RopeType = Literal["default", "linear", "llama3", "yarn", "divided"]
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """By what angle a position turns each pair of a head.

    Attributes:
      theta: the base: pair i of a head of D turns by theta**(-2 i / D) a position.
      kind: `default`; `linear` (every frequency divided by `factor`, Chen et al.,
        arXiv:2306.15595); `llama3` (low frequencies divided by `factor`, high ones kept, those
        between interpolated: Llama 3.1, and transformers' modeling_rope_utils.py); `yarn` (a ramp
        over the pairs between both, Peng et al., arXiv:2309.00071); `divided` (each frequency by
        its own of `divisors`, as GGUF files store a scaling).
      factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, beta_fast,
        beta_slow, truncate, attention_factor: as in config.json; the last multiplies cosines and
        sines.
      divisors: D / 2 numbers.
    """

    theta: float
    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()

    @property
    def context(self) -> int:
        """The positions that a scaling by YaRN is for, whatever the config's own maximum; or 0."""
        return int(self.factor * self.original_max_position_embeddings * (self.kind == "yarn"))

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
        if self.kind == "yarn":
            kept = 1 - self._ramp(half)
            return plain * (kept + (1 - kept) / self.factor)
        return plain

    def _ramp(self, half: int) -> np.ndarray:
        """YaRN's: 0 for pairs that turn `beta_fast` times or more in the original length, 1 from
        `beta_slow` down."""

        def pair(turns: float) -> float:
            length = self.original_max_position_embeddings
            return half * math.log(length / (turns * 2 * math.pi)) / math.log(self.theta)

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low or 0.001  # as in transformers, where both are one
        return np.clip((np.arange(half) - low) / width, 0, 1)

    def table(self, head_dim: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin) of every position and frequency, [P, D/2], float32 from float64.

        Both times `attention_factor`, before they are rounded.
        """
        angle = np.arange(positions, dtype=np.float64)[:, None] * self.frequencies(head_dim)
        cos, sin = (self.attention_factor * f(angle) for f in (np.cos, np.sin))
        return cos.astype(np.float32), sin.astype(np.float32)


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
    original = int(_number(settings, "original_max_position_embeddings", max_positions))
    if kind == "yarn":
        return _read_yarn(settings, theta, factor, original)
    low, high = (_number(settings, f"{name}_freq_factor") for name in ("low", "high"))
    if high <= low:
        raise ValueError(f"rope has high_freq_factor={high}; must be above low_freq_factor={low}")
    return Rope(theta, "llama3", factor, low, high, original)


def _read_yarn(settings: Mapping[str, Any], theta: float, factor: float, original: int) -> Rope:
    """Defaults and `attention_factor` as in transformers."""
    given = {key: value for key, value in settings.items() if value is not None}
    fast, slow = _number(given, "beta_fast", 32.0), _number(given, "beta_slow", 1.0)
    if fast < slow or factor < 1 or theta <= 1:
        raise ValueError(
            f"rope of type yarn has beta_fast={fast}, beta_slow={slow}, factor={factor},"
            f" rope_theta={theta}; beta_fast must not be below beta_slow, nor the factor below 1,"
            " and the base be above 1"
        )

    def scale(of: float) -> float:
        return 0.1 * of * math.log(factor) + 1.0

    attention = scale(1.0)
    if "mscale" in given and "mscale_all_dim" in given:
        attention = scale(_number(given, "mscale")) / scale(_number(given, "mscale_all_dim"))
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=bool(given.get("truncate", True)),
        attention_factor=_number(given, "attention_factor", attention),
    )


def _number(settings: Mapping[str, Any], key: str, default: Any = None) -> float:
    value = settings.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"rope has {key}={value!r}; expected a positive number")
    return float(value)
