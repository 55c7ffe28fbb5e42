"""Proof of batch invariance, and where it is lost: for any function of JAX arrays.

Names are imported on first use: pytest loads `jdet.certify.plugin` in every run of a user's
tests, also in those that never touch jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdet.certify.assertions import BatchVariance as BatchVariance
    from jdet.certify.assertions import assert_batch_invariant as assert_batch_invariant
    from jdet.certify.assertions import assert_same_bits as assert_same_bits
    from jdet.certify.auditing import Audit as Audit
    from jdet.certify.auditing import audit as audit
    from jdet.certify.bisection import Bisection as Bisection
    from jdet.certify.bisection import bisect as bisect
    from jdet.certify.certificate import Certificate as Certificate
    from jdet.certify.certification import certify as certify
    from jdet.certify.targets import without_device as without_device
    from jdet.certify.targets import without_tpu as without_tpu

_HOME = {
    "Audit": "jdet.certify.auditing",
    "BatchVariance": "jdet.certify.assertions",
    "Bisection": "jdet.certify.bisection",
    "Certificate": "jdet.certify.certificate",
    "assert_batch_invariant": "jdet.certify.assertions",
    "assert_same_bits": "jdet.certify.assertions",
    "audit": "jdet.certify.auditing",
    "bisect": "jdet.certify.bisection",
    "certify": "jdet.certify.certification",
    "without_device": "jdet.certify.targets",
    "without_tpu": "jdet.certify.targets",
}

__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jdet.certify' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
