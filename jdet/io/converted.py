"""The decoder's own parameters in Orbax checkpoints, as `jdet convert` writes them.

A folder holds `config.json` and the tokenizer's files as any model folder does, and

- `weights/0`, `weights/1`, ...: Orbax checkpoints (`orbax.checkpoint.v1`), each a dictionary of
  parameters by name. They are cut where one has `_PART` bytes, so that no more of a model than
  that stands in the host's memory while it is written.
- `weights.json`: every parameter with its part, dtype and shape; every file under `weights/` with
  its size and the CRC-32 of each `_BLOCK` bytes. It is written last: a folder without it is not
  whole.
"""

import importlib.metadata
import json
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdet.io.errors import CheckpointError

WEIGHTS, MANIFEST = "weights", "weights.json"
_FORMAT = 1
_PART = 2 << 30
_BLOCK = 64 << 20
# Pieces that a restored shard is read in: a device needs no more than those its shard touches.
_CHUNK = 64 << 20


class Stored(NamedTuple):
    """A parameter as the manifest has it."""

    part: str
    dtype: str
    shape: tuple[int, ...]


class Converted:
    """The parameters of a converted folder, not read yet.

    Attributes:
        parameters: By name.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder = folder
        self._files: Mapping[str, Any] = manifest["files"]
        self.parameters = {
            name: Stored(str(part), str(dtype), tuple(map(int, shape)))
            for name, (part, dtype, shape) in manifest["parameters"].items()
        }

    def check_files(self) -> None:
        """Reads every file once and compares it with its checksums, on all cores.

        Raises:
            CheckpointError: A file is not the one that was written; all of them are named. Or
                Orbax, which is to read them, is not installed.
        """
        _orbax()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sums = {name: list(_checksums(self._folder / name, pool)) for name in self._files}
        _refuse_files(
            self._folder,
            [f"{n} is damaged" for n, found in sums.items() if found != self._files[n]["crc32"]],
        )

    def read(self, wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Restores the parameters, one part after another, each straight to its devices.

        Args:
            wanted: By name, a ``jax.ShapeDtypeStruct`` with its sharding.
        """
        ocp = _orbax()
        for part in sorted({stored.part for stored in self.parameters.values()}, key=int):
            names = [name for name, stored in self.parameters.items() if stored.part == part]
            path = self._folder / WEIGHTS / part
            yield ocp.load(path, {name: wanted[name] for name in names})


def open_converted(folder: Path) -> Converted | None:
    """Opens what `write` wrote; None for a folder that holds nothing of the kind.

    Raises:
        CheckpointError: It is half-written, or a file is missing, of another size, or one that
            nothing wrote. The files' contents are not looked at here (`Converted.check_files`).
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        if (folder / WEIGHTS).is_dir():
            raise CheckpointError(
                f"{folder}: half-written: its conversion did not end ({MANIFEST} is missing);"
                " convert the model again"
            )
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise CheckpointError(
                f"{manifest}: format {content['format']!r}; this version reads {_FORMAT}: convert"
                " the model again"
            )
        converted = Converted(folder, content)
        sizes = {name: int(file["bytes"]) for name, file in content["files"].items()}
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: damaged ({error!r}); convert again") from None
    found = {_name(folder, path): path.stat().st_size for path in _files(folder)}
    problems = [f"{name} is missing" for name in sizes if name not in found]
    problems += [
        f"{name} has {found[name]} bytes of {size}"
        for name, size in sizes.items()
        if found.get(name, size) != size
    ]
    problems += [f"{name} belongs to no checkpoint" for name in found if name not in sizes]
    _refuse_files(folder, problems)
    return converted


def write(
    folder: Path, parameters: Iterable[tuple[str, np.ndarray]], description: Mapping[str, Any]
) -> None:
    """Writes `weights/` and, at the end, the manifest with ``description`` in it."""
    ocp = _orbax()
    context = ocp.Context()
    context.array.saving.use_compression = False  # it costs more time than it saves
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    placed: dict[str, Stored] = {}
    with context:
        for number, part in enumerate(_parts(parameters)):
            ocp.save(folder / WEIGHTS / str(number), part)
            for name, value in part.items():
                placed[name] = Stored(str(number), value.dtype.name, value.shape)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = {
            _name(folder, path): {
                "bytes": path.stat().st_size,
                "crc32": list(_checksums(path, pool)),
            }
            for path in _files(folder)
        }
    manifest = {
        "format": _FORMAT,
        "orbax-checkpoint": importlib.metadata.version("orbax-checkpoint"),
        **description,
        "parameters": placed,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _orbax() -> Any:
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        raise CheckpointError(
            f'converted models need Orbax ({error}): pip install "jdet[orbax]"'
        ) from None
    return v1


def _parts(parameters: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    part: dict[str, np.ndarray] = {}
    for name, value in parameters:
        part[name] = value
        if sum(v.nbytes for v in part.values()) >= _PART:
            yield part
            part = {}
    if part:
        yield part


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / WEIGHTS).rglob("*") if path.is_file())


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _checksums(path: Path, pool: ThreadPoolExecutor) -> Iterator[int]:
    size = path.stat().st_size
    if not size:  # an empty file cannot be mapped
        return iter(())
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return pool.map(zlib.crc32, [data[at : at + _BLOCK] for at in range(0, size, _BLOCK)])


def _refuse_files(folder: Path, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:8]) + f"; and {len(problems) - 8} more" * (len(problems) > 8)
        raise CheckpointError(f"{folder}: damaged: {shown}; convert the model again")
