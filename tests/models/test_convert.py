"""`jdet convert`: the same bits, restored sharded too, and never a folder that only looks whole."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jdet
import jdet.io.converted
import jdet.models.convert
from jdet.cli import main
from jdet.models.load import LanguageModel

GOLDENS = Path(__file__).parents[1] / "goldens"
# Norms in float32 beside bfloat16; stacked experts; shards, an untied head and biases.
NAMES = ("tiny_gemma3", "tiny_qwen3_moe", "tiny_llama3")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """converted(name, dtype): the folder made of a golden."""
    folder = tmp_path_factory.mktemp("converted")

    def of(name: str, dtype: str = "bfloat16") -> Path:
        out = folder / f"{name}-{dtype}"
        return out if out.exists() else jdet.convert(str(GOLDENS / name), out, dtype=dtype)

    return of


@pytest.fixture
def copy(converted: Callable[..., Path], tmp_path: Path) -> Path:
    """A converted folder to damage."""
    return Path(shutil.copytree(converted("tiny_gemma3"), tmp_path / "copy"))


def load(path: Path, dtype: str = "bfloat16", **options: Any) -> LanguageModel:
    return jdet.load(str(path), dtype=dtype, implementation="portable", **options)


def assert_same(model: LanguageModel, other: LanguageModel) -> None:
    """Every parameter and rope table, bit for bit."""
    assert model.config == other.config and model.decoder.dtype == other.decoder.dtype
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(m.decoder))) for m in (model, other))
    assert list(ours) == list(theirs)
    for path, value in ours.items():
        a, b = np.asarray(value[...]), np.asarray(theirs[path][...])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_as_before(converted: Callable[..., Path], name: str) -> None:
    for stored, wanted in (
        ("bfloat16", "bfloat16"),
        ("float32", "float32"),
        ("float32", "bfloat16"),
    ):
        assert_same(load(converted(name, stored), wanted), load(GOLDENS / name, wanted))


def test_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jdet.io.converted, "_PART", 4000)
    out = jdet.convert(str(GOLDENS / "tiny_gemma3"), tmp_path / "out")
    parts = sorted(int(path.name) for path in (out / "weights").iterdir())
    assert parts == list(range(len(parts))) and len(parts) > 10
    assert_same(load(out), load(GOLDENS / "tiny_gemma3"))


def test_narrow_weights_are_not_widened(converted: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="converted to bfloat16; float32 needs the original"):
        load(converted("tiny_gemma3"), "float32")


def files_of(folder: Path) -> list[Path]:
    """Those with weights, the largest first."""
    files = (path for path in (folder / "weights").rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda f: flip(files_of(f)[0]), "d/.* is damaged"),
    "a truncated file": (
        lambda f: files_of(f)[0].write_bytes(files_of(f)[0].read_bytes()[:-1]),
        r"has \d+ bytes of \d+",
    ),
    "a lost file": (lambda f: files_of(f)[1].unlink(), "is missing"),
    "a file too many": (lambda f: (f / "weights" / "0" / "x").touch(), "belongs to no checkpoint"),
    "no manifest": (lambda f: (f / "weights.json").unlink(), "half-written"),
    "half a manifest": (
        lambda f: (f / "weights.json").write_text((f / "weights.json").read_text()[:-99]),
        "weights.json: damaged",
    ),
    "another manifest": (
        lambda f: (f / "weights.json").write_text('{"format": 2}'),
        "format 2; this version reads 1",
    ),
    "no weights": (lambda f: shutil.rmtree(f / "weights"), "is missing"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_recognised(
    copy: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any], words: str
) -> None:
    # Before any device holds anything.
    monkeypatch.setattr(jdet.io.converted.Converted, "read", None)
    damage(copy)
    with pytest.raises(ValueError, match=words) as caught:
        load(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_config_of_another_model(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["layer_types"]
    (copy / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 2, "intermediate_size": 24})
    )
    with pytest.raises(ValueError) as caught:
        load(copy)
    for words in ("layers.0.mlp.down: (32, 48), expected (32, 24)", "unexpected layers.2."):
        assert words in str(caught.value)


def test_what_cannot_be_converted(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, out = str(GOLDENS / "tiny_gemma3"), tmp_path / "out"
    with pytest.raises(ValueError, match="exists; a new folder is wanted"):
        jdet.convert(golden, tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        jdet.convert(golden, out / "deeper")
    with pytest.raises(ValueError, match="was converted before"):
        jdet.convert(str(converted("tiny_gemma3")), out)
    with pytest.raises(ValueError, match="dtype='int8'; allowed: bfloat16, float32"):
        jdet.convert(golden, out, dtype="int8")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ValueError, match="0.0 GB are free there"):
            jdet.convert(golden, out)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "orbax.checkpoint", None)
        for use in (lambda: jdet.convert(golden, out), lambda: load(converted("tiny_gemma3"))):
            with pytest.raises(ValueError, match=r"need Orbax .*pip install \"jdet\[orbax\]\""):
                use()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any) -> Any:
        yield "embedding", np.zeros(3)
        raise KeyboardInterrupt

    monkeypatch.setattr(jdet.models.convert, "parameters", fails)
    with pytest.raises(KeyboardInterrupt):
        jdet.convert(str(GOLDENS / "tiny_gemma3"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# On four devices: restore sharded, from both kinds of folder; then be killed in a conversion.
CHILD = """
import os, signal, sys
import jax, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
import jdet, jdet.io.converted

source, converted, out = sys.argv[1:]
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

def cut(name, shape):
    axis = "x" if shape[0] % 4 == 0 and not name.startswith("rope") else None
    return NamedSharding(mesh, PartitionSpec(axis))

models = [
    jdet.load(path, implementation="portable", sharding=s)
    for path, s in ((source, None), (source, cut), (converted, cut))
]
states = [dict(nnx.to_flat_state(nnx.state(m.decoder))) for m in models]
for path, whole in states[0].items():
    wanted = cut(".".join(map(str, path)), whole.shape)
    for state in states[1:]:
        value = state[path][...]
        assert value.sharding == wanted, (path, value.sharding)
        assert {s.data.shape for s in value.addressable_shards} == {wanted.shard_shape(value.shape)}
        assert np.asarray(value).tobytes() == np.asarray(whole[...]).tobytes(), path
assert sum(v[...].sharding.spec != PartitionSpec(None) for v in states[2].values()) > 10
print("sharded", flush=True)

jdet.io.converted._PART = 4000
parts = jdet.io.converted._parts

def killed(parameters):
    for i, part in enumerate(parts(parameters)):
        if i == 3:
            print("killing", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        yield part

jdet.io.converted._parts = killed
jdet.convert(source, out)
"""


def test_sharded_and_killed(converted: Callable[..., Path], tmp_path: Path) -> None:
    source, out = GOLDENS / "tiny_gemma3", tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(converted("tiny_gemma3")), str(out)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "sharded\nkilling" in done.stdout and done.returncode == -9, done.stdout
    partial = tmp_path / "out.partial"
    assert list(tmp_path.iterdir()) == [partial] and files_of(partial)
    with pytest.raises(ValueError, match="half-written"):
        load(partial)
    jdet.convert(str(source), out)
    assert list(tmp_path.iterdir()) == [out]
    assert_same(load(out), load(source))


def test_a_sharding_that_does_not_fit() -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, None, "x"))
    with pytest.raises(ValueError, match=r"sharding of embedding \(96, 32\)"):
        load(GOLDENS / "tiny_gemma3", sharding=sharding)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden, out = str(GOLDENS / "tiny_gemma3"), str(tmp_path / "out")
    assert main(["convert", golden, out]) == 0
    assert f"{out}: {golden} in bfloat16" in capsys.readouterr().err
    assert main(["convert", golden, out]) == 2
    assert "exists; a new folder is wanted" in capsys.readouterr().err
