"""A batch over Ray workers: the bytes of `jdet run-batch`, whatever the number of workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jdet.cli import main

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "goldens" / "tiny_qwen3")
SIZES = (
    *("--model", MODEL, "--max-batch-size", "4"),
    *("--max-tokens-per-step", "36", "--max-model-len", "128"),
)
LINES = [
    *({"prompt": [i + 1] * (1 + i * 7 % 40), "max_tokens": 3 + i % 9} for i in range(30)),
    {"custom_id": "é\ud800", "prompt": [7, 8], "n": 2, "logprobs": 2, "max_tokens": 4},
    {"prompt": "a model without a tokenizer takes no text"},
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The input, and what one engine makes of it."""
    folder = tmp_path_factory.mktemp("batch")
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES) + "no JSON\n")
    assert main(["run-batch", "-i", str(source), "-o", str(target), *SIZES]) == 0
    return source, target.read_bytes()


def over_ray(source: Path, target: Path, workers: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "ray_batch.py"), *SIZES]
    command += ["-i", str(source), "-o", str(target), "--workers", str(workers)]
    # Half a core each, so that two of them fit where Ray finds only one.
    command += ["--lines-per-call", "4", "--cpus-per-worker", "0.5"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_bytes_of_run_batch(
    whole: tuple[Path, bytes], tmp_path: Path, workers: int
) -> None:
    source, wanted = whole
    target = tmp_path / "out.jsonl"
    ran = over_ray(source, target, workers)
    assert ran.returncode == 0, ran.stderr
    assert f"33 results by {workers} workers" in ran.stderr
    assert target.read_bytes() == wanted
    assert wanted.count(b"\n") == 33 and wanted.count(b"invalid_request") == 2
    assert not list(tmp_path.glob("*.partial"))


def test_an_output_that_is_there_is_left_alone(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_bytes(b"mine")
    ran = over_ray(whole[0], target, 1)
    assert ran.returncode == 2 and "is there already" in ran.stderr
    assert target.read_bytes() == b"mine"
