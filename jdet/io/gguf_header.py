"""The header of a GGUF file, parsed quickly and with every bound checked.

``gguf.GGUFReader`` builds several numpy views for each element of the token arrays
(3 s for 49152 tokens) and trusts the file's counts and lengths, so that a flipped bit
can send it into an endless loop. This parser takes the type codes and block sizes from
the ``gguf`` package and reads the layout itself:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jdet.io.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {  # type code in the file: numpy dtype
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file.

    Attributes:
        name: The name in the file.
        shape: Row-major shape (the reverse of the order in the file).
        kind: A ``gguf.GGMLQuantizationType``.
        offset: First byte, counted from the start of the file.
        n_bytes: Size in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata (Python scalars, strings, lists of strings, numpy arrays) and tensor places."""

    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


class _Damaged(Exception):
    """What is wrong; ``read_header`` adds the file's name."""


class _Cursor:
    """A position in the file; every read checks that the bytes are there."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> int:
        """Steps over ``count`` bytes and returns where they begin."""
        start = self.at
        if count > len(self.data) - start:
            raise _Damaged("the header runs past the end of the file")
        self.at = start + count
        return start

    def u32(self) -> int:
        return struct.unpack_from("<I", self.data, self.take(4))[0]

    def u64(self) -> int:
        return struct.unpack_from("<Q", self.data, self.take(8))[0]

    def count(self, smallest: int) -> int:
        """Reads a count of things of at least ``smallest`` bytes each, which must fit."""
        count = self.u64()
        if count * smallest > len(self.data) - self.at:
            raise _Damaged(f"a count of {count} cannot be right in a file of this size")
        return count

    def string(self) -> str:
        length = self.u64()
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, code: int) -> Any:
        if code == _STRING:
            return self.string()
        if code == _ARRAY:
            return self._array()
        return self._numbers(code, 1)[0].item()

    def _array(self) -> list[str] | np.ndarray:
        code = self.u32()
        if code == _STRING:
            return [self.string() for _ in range(self.count(8))]
        return self._numbers(code, self.count(1))

    def _numbers(self, code: int, count: int) -> np.ndarray:
        if code not in _SCALARS:
            raise _Damaged(f"metadata type {code} is unknown")
        dtype = np.dtype(_SCALARS[code])
        start = self.take(count * dtype.itemsize)
        # A copy: the metadata must not keep the file mapped.
        return np.frombuffer(self.data[start : self.at], dtype)


def read_header(data: mmap.mmap, path: Path) -> GGUFHeader:
    """Parses the header of a mapped GGUF file and checks that all tensors lie inside it.

    Raises:
        CheckpointError: Not a GGUF file, another version or byte order, a damaged
            header, or a tensor that ends after the end of the file.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
    try:
        return _parse(_Cursor(data))
    except (_Damaged, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged, truncated or unsupported GGUF: {error}") from None


def _parse(cursor: _Cursor) -> GGUFHeader:
    cursor.take(len(_MAGIC))
    version = cursor.u32()
    if version not in _VERSIONS:
        raise _Damaged(f"version {version:#x}; supported are {_VERSIONS}, little-endian")
    n_tensors = cursor.count(24)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(13)):
        key = cursor.string()
        if key in metadata:
            raise _Damaged(f"metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.u32())
    entries = [_tensor_entry(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {alignment!r}, not a power of two")
    base = -(-cursor.at // alignment) * alignment
    tensors = tuple(_place(*entry, base=base, size=len(cursor.data)) for entry in entries)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise _Damaged("a tensor name occurs twice")
    return GGUFHeader(metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Reads name, row-major shape, type code and offset within the data section."""
    name = cursor.string()
    n_dims = cursor.u32()
    if not 1 <= n_dims <= _MAX_DIMS:
        raise _Damaged(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(cursor.u64() for _ in range(n_dims))[::-1]
    return name, shape, cursor.u32(), cursor.u64()


def _place(
    name: str, shape: tuple[int, ...], code: int, offset: int, *, base: int, size: int
) -> TensorInfo:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(code)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise _Damaged(f"tensor {name!r} has the unknown type {code}") from None
    if shape[-1] % block or 0 in shape:
        raise _Damaged(f"tensor {name!r} of type {kind.name} cannot have shape {shape}")
    n_bytes = prod(shape) // block * block_bytes
    if base + offset + n_bytes > size:
        raise _Damaged(f"tensor {name!r} ends at byte {base + offset + n_bytes} of {size}")
    return TensorInfo(name, shape, kind, base + offset, n_bytes)
