"""What a transformation was asked for, in a form that equations can carry."""

import dataclasses

from jdet.contract import Contract


@dataclasses.dataclass(frozen=True)
class Rules:
    """Carried by every twin, so that its derivatives are rewritten as it was.

    Attributes:
      implementation: "portable" or "mosaic_gpu".
      leaves: parts into which a dot's contracted extent is cut, where they divide it.
      exclude: names of primitives and "file.py:line" places that are left alone.
    """

    implementation: str = "portable"
    leaves: int = 1
    exclude: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return self.implementation if self.leaves == 1 else f"{self.implementation}/{self.leaves}"

    @classmethod
    def of(cls, implementation: str, contract: Contract, exclude: tuple[str, ...]) -> "Rules":
        """The rules of these options, which the caller has checked."""
        return cls(implementation, contract.leaves, frozenset(exclude))
