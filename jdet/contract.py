"""The contract: the data that fixes in which tree every sum is added."""

import dataclasses
import hashlib
import json

# Counts the changes of a tree that is written in code rather than in a field below
# (a polynomial, the order of a merge). Raise it with a "Numerics" line in CHANGELOG.md.
REVISION = 1


@dataclasses.dataclass(frozen=True)
class Contract:
    """What fixes the bits of a result, apart from weights, request, architecture and jaxlib.

    Attributes:
      leaves: parts into which K is cut in the matmuls whose K a tensor-parallel mesh shards
        (attention output and MLP down projection); a power of two. 1 is one ascending sum.
      kv_split: keys in one attention split, cut at absolute positions; a power of two >= 16.

    Raises:
      ValueError: a field is not a power of two in its range.
    """

    leaves: int = 1
    kv_split: int = 256

    def __post_init__(self) -> None:
        for name, low in (("leaves", 1), ("kv_split", 16)):
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if not is_int or value < low or value & (value - 1):
                raise ValueError(f"{name}={value!r}; allowed: powers of two from {low}")

    def fingerprint(self, implementation: str) -> str:
        """16 hexadecimal digits that change when a tree changes; results carry them."""
        data = {
            "revision": REVISION,
            "implementation": implementation,
            **dataclasses.asdict(self),
        }
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
