"""The batch runner: results by line, in order, the same bytes whatever happens on the way."""

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jdet
from jdet.batch.lines import parse, read_lines, request_of
from jdet.batch.output import Output
from jdet.batch.runner import BatchRunner
from jdet.engine.config import EngineConfig
from jdet.engine.engine import Engine
from jdet.models.config import DecoderConfig
from jdet.models.load import LanguageModel
from jdet.testing import tiny_config

CONFIG = EngineConfig(
    max_batch_size=4,
    max_tokens_per_step=36,
    max_model_len=256,
    num_pages=16,
    chunk_sizes=(32,),
    decode_rows=(4,),
)


@functools.cache
def model() -> LanguageModel:
    config = DecoderConfig.from_hf(tiny_config())
    return jdet.random_model(config, dtype="bfloat16", implementation="portable")


def run(source: Path, target: Path, config: EngineConfig = CONFIG) -> Any:
    return BatchRunner(Engine(model(), config), "tiny", "bfloat16").run(
        source, target, progress=False
    )


def openai(custom_id: str, prompt: list[int], **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "any", "prompt": prompt, "max_tokens": 6, **body},
    }


LINES = [
    openai("greedy", [1, 2, 3], temperature=0),
    openai("hot", [1, 2, 3], n=2, logprobs=2),
    {"prompt": list(range(40)), "max_tokens": 9, "top_p": 0.9, "prompt_logprobs": 1},
    openai("biased", [5], logit_bias={"7": 100}, seed=3),
    *({"prompt": [i] * (i + 1), "max_tokens": i + 1} for i in range(12)),
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_stand_in_input_order_with_ids_usage_and_fingerprint(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    summary = run(write(tmp_path / "in.jsonl", LINES), target)
    assert (summary.written, summary.found, summary.failed) == (16, 0, 0)
    out = results(target)
    assert [r["custom_id"] for r in out[:4]] == ["greedy", "hot", None, "biased"]
    assert [len(r["response"]["body"]["choices"][0]["token_ids"]) for r in out[4:]] == [
        *range(1, 13)
    ]
    hot, biased = out[1]["response"]["body"], out[3]["response"]["body"]
    assert hot["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    assert hot["system_fingerprint"] == model().ops.fingerprint
    first, second = hot["choices"]
    assert first["token_ids"] != second["token_ids"] and first["seed"] == second["seed"]
    assert [len(top) for top in first["logprobs"]["top_logprobs"]] == [2] * 6
    assert biased["choices"][0]["token_ids"] == [7] * 6 and biased["choices"][0]["seed"] == 3
    (wanted,) = Engine(model(), CONFIG).generate(
        [[1, 2, 3]], jdet.SamplingParams(temperature=0, max_tokens=6)
    )
    assert out[0]["response"]["body"]["choices"][0]["token_ids"] == wanted.token_ids
    assert len(out[2]["response"]["body"]["choices"][0]["prompt_logprobs"]) == 39
    assert not list(tmp_path.glob("*.partial"))


def test_order_batch_size_and_partition_leave_the_bytes_of_each_line(tmp_path: Path) -> None:
    whole, turned = tmp_path / "whole", tmp_path / "turned"
    run(write(tmp_path / "a", LINES), whole)
    run(write(tmp_path / "b", LINES[::-1]), turned)
    assert whole.read_bytes().splitlines() == turned.read_bytes().splitlines()[::-1]
    narrow = EngineConfig(
        max_batch_size=1, max_tokens_per_step=36, max_model_len=256, num_pages=4, chunk_sizes=(32,)
    )
    one_by_one = tmp_path / "narrow"
    run(tmp_path / "a", one_by_one, narrow)
    assert one_by_one.read_bytes() == whole.read_bytes()
    parts = b""
    for i, part in enumerate((LINES[:5], LINES[5:])):
        run(write(tmp_path / f"in-{i}", part), tmp_path / f"out-{i}")
        parts += (tmp_path / f"out-{i}").read_bytes()
    assert parts == whole.read_bytes()


def test_a_bad_line_has_its_error_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_lines, "__defaults__", (2000,))
    good = json.dumps({"prompt": [1], "max_tokens": 2}).encode()
    bad = {
        b'{"prompt": [1]': "the line is no JSON",
        b"\xff\xfe": "the line is no JSON",
        b"[1, 2]": "the line is a JSON list; allowed: an object",
        b'{"prompt": [' + b"1," * 1500 + b"1]}": "bytes",
        b'{"prompt": 7}': "prompt must be a string or a list of token ids",
        b'{"prompt": "text"}': "no tokenizer",
        b'{"prompt": [1], "temprature": 1}': "unknown parameters: temprature",
        b'{"prompt": [1], "temperature": -1}': "temperature=-1; allowed",
        b'{"prompt": [1], "temperature": "1"}': "temperature='1'; allowed",
        b'{"prompt": [1], "stream": true}': "a batch has no streams",
        b'{"prompt": [1], "n": 1000000000}': "n=1000000000; allowed in a batch: 1 to 128",
        b'{"prompt": [999999]}': "outside",
        b'{"prompt": [1], "max_tokens": 300}': "together at most 256",
        b'{"custom_id": 3, "prompt": [1]}': "custom_id=3; allowed: a string",
        b'{"body": {"prompt": [1]}, "url": "/v1/embeddings"}': "url='/v1/embeddings'; allowed",
        b'{"body": []}': "body is a list; allowed: an object",
        b'{"messages": []}': "messages must be a list of objects",
        b'{"messages": [{"role": "user", "content": "x"}]}': "no chat template",
    }
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"\n".join(line + b"\n\n" + good for line in bad))
    summary = run(source, target)
    assert summary.failed == len(bad)
    out = results(target)
    assert len(out) == 2 * len(bad)
    for message, wrong, right in zip(bad.values(), out[::2], out[1::2], strict=True):
        assert message in wrong["error"]["message"] and wrong["response"] is None
        assert right["error"] is None and right == out[1]


def test_a_line_of_100_megabytes_is_never_held_in_memory(tmp_path: Path) -> None:
    source = tmp_path / "in"
    with open(source, "wb") as file:
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'\n{"prompt": [1]}')
    with open(source, "rb") as file:
        long, short = read_lines(file)
    assert long.content is None and short.content == b'{"prompt": [1]}'
    with pytest.raises(ValueError, match="more than 16777216 bytes"):
        parse(long)


def test_without_a_seed_the_line_decides_it() -> None:
    def seed(text: str) -> int | None:
        line = next(iter(read_lines(io.BytesIO(text.encode()))))
        return request_of(parse(line)[1], line.digest).sampling.seed

    assert seed('{"prompt": [1]}') == seed('{"prompt": [1]}\r\n') != seed('{"prompt": [2]}')
    assert seed('{"prompt": [1], "seed": 5}') == 5
    assert seed('{"prompt": [1], "temperature": 0}') is None


def killed_runs(engine: str, source: Path, target: Path, *, kills: int, seed: int) -> list[int]:
    """How many results lay in the output at each kill that found its run alive."""
    child = Path(__file__).parent / "kill_child.py"
    arguments = (engine, str(source), str(target), str(kills), str(seed))
    # The runs of a real engine compile the same programs.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(target.with_name("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, str(child), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | cache,
    )
    return [int(count) for count in done.stdout.split()]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path, seed: int) -> None:
    source = write(
        tmp_path / "in", [{"prompt": [i, 1, 2], "custom_id": str(i)} for i in range(300)]
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert killed_runs("pretended", source, whole, kills=0, seed=seed) == []
    assert len(killed_runs("pretended", source, killed, kills=20, seed=seed)) >= 10
    assert killed.read_bytes() == whole.read_bytes()
    assert len(results(killed)) == 300


def test_a_real_engine_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """What is left after a kill runs beside other mates, in another process, in other sizes."""
    lines = [{"prompt": [i + 1] * (1 + i * 7 % 40), "max_tokens": 3 + i % 9} for i in range(24)]
    source = write(tmp_path / "in", lines)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(source, whole)
    at = killed_runs("real", source, killed, kills=2, seed=1)
    assert len(at) == 2 and 0 < at[0] <= at[1] < 24, at
    assert killed.read_bytes() == whole.read_bytes()


def test_what_a_kill_left_is_kept_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", LINES), tmp_path / "out"
    run(source, target)
    whole = target.read_bytes()
    third = [i for i, byte in enumerate(whole) if byte == 10][2] + 1
    for cut in (0, 1, third - 1, third, third + 40, len(whole)):
        target.unlink(missing_ok=True)
        (tmp_path / "out.partial").write_bytes(whole[:cut])
        summary = run(source, target)
        assert summary.found == whole[:cut].count(b"\n")
        assert target.read_bytes() == whole
    assert run(source, target).found == 16  # it was complete already


def test_results_of_another_input_or_model_are_not_gone_on_with(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", LINES), tmp_path / "out"
    run(source, target)
    other = write(tmp_path / "other", LINES[1:])
    with pytest.raises(ValueError, match=r"out is of another input or model \(line 1\)"):
        run(other, target)
    target.rename(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=r"out.partial is of another input or model"):
        run(other, target)
    with pytest.raises(ValueError, match="more results than there are lines"):
        run(write(tmp_path / "fewer", LINES[:3]), target)
    runner = BatchRunner(Engine(model(), CONFIG), "another", "bfloat16")
    with pytest.raises(ValueError, match="another input or model"):
        runner.run(source, target)


def test_a_full_disk_says_what_is_kept_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Output(tmp_path / "out") as output:
        output.append([{"id": 1}])
        monkeypatch.setattr("os.fsync", _full)
        with pytest.raises(OSError, match="No space left.*1 results are kept in .*goes on"):
            output.append([{"id": 2}])


def _full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    with Output(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing it"):
        Output(tmp_path / "out").__enter__()
