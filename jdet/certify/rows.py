"""Where the rows of a batch stand in an array: what a value's layout can be."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where a row stands: on `axis`, or on the `span` axes from there on, taken as one.

    From `offset` on, the axis is (major, extent, minor) in C order, and row r is [:, r, :].
    What stands before and behind is padding.
    """

    axis: int
    extent: int
    major: int = 1
    minor: int = 1
    offset: int = 0
    span: int = 1

    @property
    def axes(self) -> range:
        """All of its axes."""
        return range(self.axis, self.axis + self.span)

    @property
    def size(self) -> int:
        """What of the axis the rows take."""
        return self.major * self.extent * self.minor

    def fills(self, shape: Sequence[int]) -> bool:
        """There is no padding."""
        return self.offset == 0 and self.merged(shape)[self.axis] == self.size

    def merged(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape with its axes as one."""
        return merged(shape, self.axis, self.span)

    def take(self, value: NDArray[Any], row: int) -> NDArray[Any]:
        """One row: the shape without the axis, or with what is merged into it."""
        value = value.reshape(self.merged(value.shape))
        before, after = value.shape[: self.axis], value.shape[self.axis + 1 :]
        held = np.take(value, range(self.offset, self.offset + self.size), self.axis)
        split = held.reshape(*before, self.major, self.extent, self.minor, *after)
        merged = self.major * self.minor
        shape = (*before, *(() if merged == 1 else (merged,)), *after)
        return np.take(split, row, len(before) + 1).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A value for every tile of rows: row r has that at place (offset + r) // height of `axis`."""

    axis: int
    height: int
    offset: int = 0

    def take(self, value: NDArray[Any], row: int) -> NDArray[Any]:
        """That of one row."""
        return np.take(value, (self.offset + row) // self.height, self.axis)


@dataclasses.dataclass(frozen=True)
class NoRows:
    """A value without a batch axis. `SHARED`: all rows see it whole. `UNKNOWN`: not told."""

    name: str


SHARED = NoRows("shared")
UNKNOWN = NoRows("unknown")
type Layout = Rows | Tiles | NoRows


def merged(shape: Sequence[int], axis: int, span: int) -> tuple[int, ...]:
    """The shape with so many axes from `axis` on as one."""
    return (*shape[:axis], math.prod(shape[axis : axis + span]), *shape[axis + span :])
