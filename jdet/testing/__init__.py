"""Small models and batch compositions for tests of equivalence, ours and yours."""

from jdet.testing.bits import Difference, bit_patterns, first_difference, ulp_distance
from jdet.testing.compositions import (
    Composition,
    compose,
    run_batch,
    run_composition,
    same_bits,
)
from jdet.testing.models import small_config, tiny_config
from jdet.testing.soak import Soak, same_completions, soak

__all__ = [
    "Composition",
    "Difference",
    "Soak",
    "bit_patterns",
    "compose",
    "first_difference",
    "run_batch",
    "run_composition",
    "same_bits",
    "same_completions",
    "small_config",
    "soak",
    "tiny_config",
    "ulp_distance",
]
