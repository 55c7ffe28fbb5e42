"""Weights from a Hugging Face folder: one ``.safetensors`` file, or shards with an index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jdet.io.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")


class SafetensorsTensor:
    """A tensor of an opened ``.safetensors`` file."""

    def __init__(self, handle: Any, name: str, shape: tuple[int, ...]) -> None:
        self._handle = handle
        self._name = name
        self.shape = shape

    def read(self, dtype: npt.DTypeLike) -> np.ndarray:
        """Returns a fresh array cast to ``dtype`` (round to nearest even where it narrows)."""
        return self._handle.get_tensor(self._name).astype(dtype, copy=False)


def open_tensors(folder: Path) -> Mapping[str, SafetensorsTensor]:
    """Opens every shard of a folder and returns its tensors by name.

    The shards are those of ``model.safetensors.index.json`` where there is one,
    otherwise the folder's only ``*.safetensors`` file.

    Raises:
        CheckpointError: No weights, several files without an index, a missing shard, a
            damaged or truncated file, a tensor that the index promises and its shard
            lacks, or a dtype other than F32, F16 and BF16.
    """
    index = folder / _INDEX
    if not index.is_file():
        return _open_file(_only_file(folder))
    placed = _read_index(index)
    shards: dict[str, dict[str, SafetensorsTensor]] = {}
    for shard in sorted(set(placed.values())):
        # A shard's name comes from the file: it may not lead out of the folder.
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{folder}: shard {shard!r} of {_INDEX} is missing")
        shards[shard] = _open_file(folder / shard)
    lost = [name for name, shard in placed.items() if name not in shards[shard]]
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} tensor(s) of {_INDEX} are in no shard, first {lost[0]!r}"
        )
    return {name: shards[shard][name] for name, shard in placed.items()}


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)} *.safetensors files" if files else "no *.safetensors file"
        raise CheckpointError(f"{folder}: {found} and no {_INDEX}; expected one file or an index")
    return files[0]


def _read_index(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({error!r})") from None
    if not (isinstance(placed, dict) and all(isinstance(shard, str) for shard in placed.values())):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    return placed


def _open_file(path: Path) -> dict[str, SafetensorsTensor]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, SafetensorsTensor] = {}
    try:
        # The numpy framework returns BF16 as ml_dtypes.bfloat16 and, unlike the flax
        # one, does not put every tensor on a jax device.
        handle = safe_open(path, framework="numpy")
        for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
            part = handle.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in _DTYPES:
                allowed = ", ".join(_DTYPES)
                raise CheckpointError(f"{path}: tensor {name!r} is {dtype}; supported: {allowed}")
            tensors[name] = SafetensorsTensor(handle, name, tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file ({error})") from None
    return tensors
