"""A batch over several processes, each a host of its own: the bytes of one, killed or not."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jdet.batch.options import BatchOptions
from jdet.batch.parts import check_parts, merge, part

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "goldens" / "tiny_qwen3")
OPTIONS = BatchOptions(
    MODEL,
    dtype="bfloat16",
    implementation=None,
    max_batch_size=1,
    max_tokens_per_step=17,
    max_model_len=128,
)
LINES = [
    *({"prompt": [i + 1] * (1 + i * 7 % 40), "max_tokens": 3 + i % 9} for i in range(30)),
    {"custom_id": "é\ud800", "prompt": [7, 8], "n": 2, "max_tokens": 4},
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The input, and what one engine makes of it."""
    folder = tmp_path_factory.mktemp("batch")
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    # Lines that nobody answers stand between them: they are nobody's share.
    source.write_text("".join(json.dumps(line) + "\n\n" for line in LINES) + "no JSON\n")
    OPTIONS.runner().run(source, target, progress=False)
    return source, target.read_bytes()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All hosts compile the same programs."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def begin(
    source: Path, target: Path, environment: dict[str, str], devices: tuple[int, ...]
) -> list[subprocess.Popen[str]]:
    """A process for each host, of so many devices."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "pod_batch.py"), "--model", MODEL]
    command += ["-i", str(source), "-o", str(target), "--max-batch-size", "1"]
    command += ["--max-tokens-per-step", "17", "--max-model-len", "128"]
    command += ["--coordinator", f"localhost:{port}", "--hosts", str(len(devices)), "--host"]
    return [
        subprocess.Popen(
            [*command, str(host)],
            env=os.environ
            | environment
            | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, count in enumerate(devices)
    ]


def end(hosts: list[subprocess.Popen[str]]) -> str:
    """What they say, once all have ended well."""
    said = [host.communicate()[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0] * len(hosts), "\n".join(said)
    return "\n".join(said)


def test_hosts_that_are_killed_go_on_to_the_bytes_of_one_engine(
    whole: tuple[Path, bytes], programs: dict[str, str], tmp_path: Path
) -> None:
    source, wanted = whole
    assert wanted.count(b"\n") == 32 and wanted.count(b"invalid_request") == 1
    target = tmp_path / "out.jsonl"

    def results() -> list[int]:
        """Of each device, written so far."""
        found = [[p for p in tmp_path.iterdir() if f"part-{i:04d}" in p.name] for i in range(3)]
        return [paths[0].read_bytes().count(b"\n") if paths else 0 for paths in found]

    hosts = begin(source, target, programs, devices=(2, 1))
    while max(results()) < 3:
        assert all(host.poll() is None for host in hosts), "it ended before it was killed"
        time.sleep(0.002)
    for host in hosts:
        host.kill()
        host.communicate()
    assert not target.exists() and 3 <= sum(results()) < 32
    # What is left is of three devices: with two, lines would be another's.
    with pytest.raises(ValueError, match="another number of workers than 2"):
        check_parts(target, 2)
    said = end(begin(source, target, programs, devices=(2, 1)))
    assert "complete, 3 devices of 2 hosts" in said and "host 1: done" in said
    assert target.read_bytes() == wanted
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_parts_are_merged_in_turn_and_again_after_a_kill(workers: int, tmp_path: Path) -> None:
    target = tmp_path / "out"
    lines = [json.dumps({"id": i, "é": "\ud800"}, sort_keys=True) + "\n" for i in range(600)]
    lines = [line.replace("\\u00e9", "é") for line in lines]
    wanted = "".join(lines).encode()
    parts = [part(target, i, workers) for i in range(workers)]
    for i, path in enumerate(parts):
        path.write_text("".join(lines[i::workers]))
    for kept in (0, 1, 300, len(wanted) - 1, len(wanted)):
        target.unlink(missing_ok=True)
        target.with_name("out.partial").write_bytes(wanted[:kept])
        assert merge(parts, target) == 600
        assert target.read_bytes() == wanted


def test_parts_of_different_inputs_are_not_merged(tmp_path: Path) -> None:
    target = tmp_path / "out"
    parts = [part(target, i, 3) for i in range(3)]
    for path, count in zip(parts, (2, 1, 2), strict=True):
        path.write_text("{}\n" * count)
    with pytest.raises(ValueError, match="do not have the lines of one input"):
        merge(parts, target)
    assert not target.exists()
