"""One view of a model on disk, whichever format it is stored in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jdet.io.converted import Converted, open_converted
from jdet.io.errors import CheckpointError
from jdet.io.gguf import read_gguf
from jdet.io.safetensors import open_tensors
from jdet.io.tokenizer import Tokenizer


@runtime_checkable
class TensorSource(Protocol):
    """One tensor of a checkpoint, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, as Hugging Face stores it (``[out, in]`` for a projection)."""
        ...

    def read(self, dtype: npt.DTypeLike) -> np.ndarray:
        """Reads, dequantises where needed and returns a fresh array cast to ``dtype``."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration, weights and tokenizer.

    Attributes:
        config: A Hugging Face style ``config.json`` dictionary. ``rope_theta`` and
            ``rope_scaling`` stand at the top level, also where the file nests them
            in ``rope_parameters``.
        tensors: Hugging Face tensor names (``model.embed_tokens.weight``,
            ``model.layers.0.self_attn.q_proj.weight``, ..., ``lm_head.weight``) to
            sources; no weight is read before its ``read``. ``lm_head.weight`` is
            absent where the file ties it to the embedding. Empty where the folder was
            converted.
        tokenizer: The file's tokenizer; None where the file has none (such a model
            takes token ids only).
        source: The path it was opened from, for messages.
        converted: The decoder's own parameters, in a folder that ``jdet convert`` wrote.
    """

    config: dict[str, Any]
    tensors: Mapping[str, TensorSource]
    tokenizer: Tokenizer | None
    source: str
    converted: Converted | None = None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a ``.gguf`` file, or a folder with ``config.json`` and weights.

    Those are ``*.safetensors``, or what ``jdet convert`` wrote.

    Only headers are read here, but all of them: a truncated or damaged file is found
    now rather than halfway through loading.

    Raises:
        CheckpointError: The path is neither, or its content is damaged, incomplete or
            of an unsupported kind.
    """
    path = Path(path)
    tensors: Mapping[str, TensorSource]
    converted = None
    if path.is_file() and path.suffix.lower() == ".gguf":
        config, tensors, tokenizer = read_gguf(path)
    elif path.is_dir():
        converted = open_converted(path)
        config = _read_config(path / "config.json")
        tensors = {} if converted else open_tensors(path)
        has_tokenizer = (path / "tokenizer.json").is_file()
        tokenizer = Tokenizer.from_folder(path) if has_tokenizer else None
    else:
        raise CheckpointError(
            f"{path}: {'not a checkpoint' if path.exists() else 'no such file or folder'}; allowed "
            "are a .gguf file and a folder with config.json and *.safetensors"
        )
    return Checkpoint(config, tensors, tokenizer, str(path), converted)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes ``config.json`` as `open_checkpoint` reads it."""
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _read_config(path: Path) -> dict[str, Any]:
    """Reads ``config.json`` and brings the two spellings of the RoPE settings to one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: no config.json; a model folder holds config.json and *.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: not a model configuration (no model_type)")
    # transformers 5 writes rope_parameters, earlier versions rope_theta + rope_scaling.
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        if "rope_theta" in rope:
            config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    return config
