"""Small models and batch compositions for tests of equivalence, ours and yours."""

from jdet.testing.compositions import (
    Composition,
    compose,
    run_batch,
    run_composition,
    same_bits,
)
from jdet.testing.models import small_config

__all__ = ["Composition", "compose", "run_batch", "run_composition", "same_bits", "small_config"]
