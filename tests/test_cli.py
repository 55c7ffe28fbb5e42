"""The command line: what it prints, what it refuses, and how soon."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as token_models

from jdet.cli import main
from jdet.contract import Contract
from jdet.pallas_kernels.generations import GENERATIONS
from jdet.text_stream import TextStream

TINY = Path(__file__).parent / "goldens" / "tiny_qwen3"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ascii_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE over ASCII, 160 tokens: the vocabulary of the tiny model."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = [("Ġ", c) for c in letters] + [("e", c) for c in letters]
    merges += [("t", c) for c in letters[: 160 - 99 - len(merges)]]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ"]
    tokens += [chr(c) for c in range(33, 127)] + [a + b for a, b in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    assert len(vocabulary) == 160
    backend = tokenizers.Tokenizer(token_models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(tokens[:3])
    return backend


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The tiny Qwen3 (context 512) with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(TINY, folder)
    ascii_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


class Printed(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys) -> Callable[..., Printed]:
    def call(*arguments: str) -> Printed:
        status = main(arguments)
        return Printed(status, *capsys.readouterr())

    return call


def process(*arguments: str, **environment: str) -> Printed:
    """The same in a process of its own."""
    code = "import sys; from jdet.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return Printed(done.returncode, done.stdout, done.stderr)


def assert_refused(printed: Printed, expected: str) -> None:
    lines = printed.err.strip().splitlines()
    assert printed.status == 2, printed
    assert 1 <= len(lines) <= 2 and lines[0].startswith("jdet: error: "), printed.err
    assert expected in printed.err
    assert printed.out == ""


BAD_REQUESTS = [
    ([""], "the prompt is empty"),
    (["--raw", ""], "the prompt is empty"),
    (["x" * 600], "together at most 512, the model's context length"),
    (["hi", "--max-tokens", "511"], "together at most 512"),
    (["hi", "--max-tokens", "0"], "max_tokens=0; allowed: integers from 1"),
    (["hi", "--model", "no-such-model"], "unknown model 'no-such-model'"),
    (["hi", "--temperature", "-1"], "temperature=-1.0; allowed: 0, or 1e-4 to 1e4"),
    (["hi", "--temperature", "nan"], "temperature=nan; allowed"),
    (["hi", "--top-p", "0"], "top_p=0.0; allowed: 0 < top_p <= 1"),
    (["hi", "--top-p", "1.5"], "top_p=1.5; allowed: 0 < top_p <= 1"),
    (["hi", "--min-p", "2"], "min_p=2.0; allowed: 0 <= min_p <= 1"),
    (["hi", "--top-k", "-3"], "top_k=-3; allowed: integers from 0"),
    (["hi", "--n", "0"], "n=0; allowed: integers from 1"),
    (["hi", "--n", "2", "--temperature", "0"], "n=2 with temperature=0"),
    (["hi", "--seed", "abc"], "Invalid value for '--seed'"),
    (["hi", "--seed", "-1"], "seed=-1; allowed: integers 0..2**64-1"),
    (["hi", "--stop", ""], "allowed: non-empty strings"),
    (["hi", "--dtype", "float8"], "dtype='float8'; allowed: bfloat16, float32"),
    (["hi", "--implementation", "cuda"], "unknown implementation 'cuda'"),
    (["hi", "--implementation", "jax_triton"], "no 'jax_triton' implementation yet"),
    (["hi", "--no-such-option"], "No such option"),
    ([], "Missing argument"),
]


@pytest.mark.parametrize("arguments, expected", BAD_REQUESTS)
def test_bad_request(arguments, expected, tiny, run, monkeypatch):
    def compiles(*_args, **_kwargs):
        raise AssertionError("refused too late: the model would have been compiled")

    monkeypatch.setattr("jdet.generation.Engine", compiles)
    if "--model" not in arguments:
        arguments = [*arguments, "--model", tiny]
    assert_refused(run("generate", *arguments), expected)


def test_damaged_files(tiny, run, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(tiny, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(run("generate", "hi", "--model", str(folder)), "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qw')
    assert_refused(run("generate", "hi", "--model", str(folder)), "config.json")
    gguf = tmp_path / "cut.gguf"
    gguf.write_bytes(b"GGUF\x03\0\0\0\x01")
    assert_refused(run("generate", "hi", "--model", str(gguf)), "cut.gguf")


def test_text_needs_a_tokenizer_and_chat_a_template(tiny, run, tmp_path):
    assert_refused(run("generate", "hi", "--model", str(TINY)), "has no tokenizer")
    folder = tmp_path / "base"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer_config.json").unlink()
    assert_refused(run("generate", "hi", "--model", str(folder)), "--raw takes the prompt as it is")


def test_refused_flags(tiny, run, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_allow_excess_precision=true")
    for command in (["generate", "hi", "--model", tiny], ["demo", "--model", tiny]):
        assert_refused(run(*command), "XLA_FLAGS sets --xla_allow_excess_precision=true")


def test_env_reports_refused_flags():
    printed = process("env", "--json", XLA_FLAGS="--xla_cpu_enable_fast_math=true")
    report = json.loads(printed.out)
    assert printed.status == 2
    assert report["xla_flags"]["found"] == "--xla_cpu_enable_fast_math=true"
    assert not report["xla_flags"]["accepted"] and not report["mode"]["batch_invariant"]
    assert printed.err.splitlines() == [f"jdet: error: {report['xla_flags']['refusal']}"]


def test_no_device():
    printed = process("env", JAX_PLATFORMS="nonsense")
    assert_refused(printed, "jax finds no device (JAX_PLATFORMS='nonsense')")


def test_env(run):
    status, out, err = run("env", "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["versions"].keys() == {"jdet", "jax", "jaxlib", "flax", "numpy", "python"}
    assert {"platform", "kind", "count"} <= report["device"].keys()
    mode = {"implementation": "portable", "kernels": [], "batch_invariant": True}
    assert report["mode"] == mode
    assert {"reference", "portable", "xla"} <= set(report["implementations"]["matmul"])
    assert report["contract"].keys() == {"leaves", "kv_split"}
    assert report["compiler_options"]["xla_allow_excess_precision"] is False
    text = run("env").out
    assert report["fingerprint"] in text and report["versions"]["jaxlib"] in text


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As if jax had found TPUs of a kind."""
    chip = SimpleNamespace(platform="tpu", device_kind=kind)
    monkeypatch.setattr("jax.devices", lambda: [chip] * 4)


@pytest.mark.parametrize(("version", "shown"), [("0.11.2", True), ("0.12.0", False)])
def test_env_says_for_which_jaxlib_the_guarantees_are_shown(version, shown, run, monkeypatch):
    monkeypatch.setattr("jdet.environment.versions", lambda: {"jaxlib": version})
    notes = json_of(run("env", "--json"))["notes"]
    assert any(f"not for {version}" in note for note in notes) != shown


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda g: g.name)
def test_env_on_a_tpu_names_generation_contract_and_kernels(generation, run, monkeypatch):
    pretend(monkeypatch, generation.device_kinds[0])
    report = json_of(run("env", "--json"))
    assert report["device"] | {"host_cpu": 0, "host_cores": 0} == {
        "platform": "tpu",
        "kind": generation.device_kinds[0],
        "generation": generation.name,
        "count": 4,
        "host_cpu": 0,
        "host_cores": 0,
    }
    assert report["mode"] == {
        "implementation": "mosaic_tpu",
        "kernels": [
            *("attention", "expert_norm", "gated_matmul", "grouped_gated_matmul"),
            *("grouped_matmul", "log_normalizer", "matmul", "qkv_heads", "rms_norm"),
        ],
        "batch_invariant": True,
    }
    assert report["fingerprint"] == Contract().fingerprint("mosaic_tpu")
    assert report["compiler_options"] == {"xla_allow_excess_precision": False}
    text = run("env").out
    assert generation.name in text and report["fingerprint"] in text
    assert "kernels              attention, expert_norm" in text
    assert "no TPU has run them yet" in text


def test_a_tpu_that_nobody_compiled_for_needs_portable_asked_for(run, monkeypatch, tiny):
    pretend(monkeypatch, "TPU v9 super")
    report = json_of(run("env", "--json"))
    assert report["device"]["generation"] is None
    assert report["mode"] == {"implementation": None, "kernels": [], "batch_invariant": False}
    [note] = report["notes"]
    assert "not been compiled for 'TPU v9 super', only for v5e, v5p, v6e, tpu7x" in note
    asked = ["generate", "hi", "--model", tiny, "--temperature", "0", "--max-tokens", "2"]
    refused = run(*asked)
    assert_refused(refused, "pass implementation='portable' to use plain jnp there")
    # Asked for, it runs (on the CPU behind the pretence).
    assert run(*asked, "--implementation", "portable").status == 0


def test_help_and_errors_do_not_wait_for_jax():
    code = (
        "import sys; from jdet.cli import main\n"
        "assert main([]) == 0\n"
        "assert main(['generate', 'hi', '--seed', 'abc']) == 2\n"
        "assert main(['generate', '']) == 2\n"
        "assert main(['nothing']) == 2\n"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
    assert "demo" in done.stdout and "generate" in done.stdout


def json_of(printed: Printed) -> dict:
    assert printed.status == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.parametrize("more", [[], ["--ignore-eos"], ["--stop", "e", "--stop", "qz"]])
def test_streamed_text_is_the_json_text(more, tiny, run):
    asked = ["generate", "hello", "--model", tiny, "--seed", "3", "--max-tokens", "16", *more]
    [completion] = json_of(run(*asked, "--json"))["completions"]
    assert completion["text"]
    assert run(*asked) == (0, completion["text"] + "\n", "")
    if "e" in more:
        assert completion["finish_reason"] == "stop" and "e" not in completion["text"]


def test_json_and_logprobs(tiny, run):
    asked = ["generate", "hello", "--model", tiny, "--temperature", "0", "--max-tokens", "5"]
    report = json_of(run(*asked, "--json"))
    [completion] = report["completions"]
    assert completion.keys() == {
        *("text", "token_ids", "logprobs", "finish_reason"),
        *("seed", "sample_index", "fingerprint"),
    }
    assert report["model"] == tiny and {"versions", "device"} <= report.keys()
    assert completion["seed"] is None and len(completion["token_ids"]) == 5
    listed = run(*asked, "--logprobs").out.removeprefix(completion["text"] + "\n").splitlines()
    _, ids, values = zip(*(line.split("\t") for line in listed), strict=True)
    assert [int(i) for i in ids] == completion["token_ids"]
    assert [float(v) for v in values] == pytest.approx(completion["logprobs"], rel=1e-7)


def test_drawn_seed_is_reported(tiny, run):
    asked = ["generate", "hello", "--model", tiny, "--max-tokens", "16"]
    drawn = run(*asked)
    assert drawn.err.startswith("seed ")
    assert run(*asked, "--seed", drawn.err.split()[1]) == (0, drawn.out, "")


def test_samples_one_after_another(tiny, run):
    asked = ["generate", "hello", "--model", tiny, "--seed", "3", "--max-tokens", "16", "--n", "2"]
    completions = json_of(run(*asked, "--json"))["completions"]
    assert [c["sample_index"] for c in completions] == [0, 1]
    assert completions[0]["token_ids"] != completions[1]["token_ids"]
    shown = "".join(f"--- sample {i} of 2\n{c['text']}\n" for i, c in enumerate(completions))
    assert run(*asked).out == shown


def test_raw_prompt(tiny, run):
    asked = ["generate", "--model", tiny, "--temperature", "0", "--max-tokens", "5", "--json"]
    chat = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    [templated] = json_of(run(*asked, "hello"))["completions"]
    [by_hand] = json_of(run(*asked, "--raw", chat))["completions"]
    [raw] = json_of(run(*asked, "--raw", "hello"))["completions"]
    assert templated == by_hand
    assert templated["logprobs"] != raw["logprobs"]


def test_another_process_gives_the_same_bits(tiny, run):
    asked = ["generate", "hello", "--model", tiny, "--seed", "3", "--max-tokens", "16", "--json"]
    assert json_of(process(*asked)) == json_of(run(*asked))


class Letters:
    """A decoder whose token ids are code points."""

    def push(self, token_id: int) -> str:
        return chr(token_id)


@given(
    st.text("ab.", max_size=30),
    st.lists(st.text("ab.", min_size=1, max_size=4), max_size=2),
    st.integers(1, 5),
)
def test_stop_strings_never_show(text, stops, step):
    # What `generate` makes of it: tokens end with the one that completes a stop string.
    ends = [i for i in range(len(text) + 1) if any(s in text[:i] for s in stops)]
    tokens = text[: ends[0]] if ends else text
    wanted = tokens[: min([tokens.index(s) for s in stops if s in tokens], default=len(tokens))]
    stream = TextStream(Letters(), stops)
    shown = ""
    for at in range(0, len(tokens), step):
        shown += stream.push([ord(c) for c in tokens[at : at + step]])
        assert wanted.startswith(shown)
    assert shown + stream.finish(wanted) == wanted


# jdet run-batch


SMALL = ("--max-batch-size", "2", "--max-tokens-per-step", "18", "--max-model-len", "128")


def test_run_batch_answers_prompts_and_chats_with_what_generate_says(tiny, run, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    sampling = {"temperature": 0, "max_tokens": 5}
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
    lines = [
        {"prompt": "hi", **sampling},
        {"custom_id": "c", "url": "/v1/chat/completions", "body": {**chat, **sampling}},
        {"prompt": "hi", "temperature": "hot"},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("run-batch", "-i", str(source), "-o", str(target), "--model", tiny, *SMALL)
    assert done.status == 0 and "3 results" in done.err and "1 of this run's lines" in done.err
    plain, answer, bad = (json.loads(line) for line in target.read_text().splitlines())
    for arguments, text in (
        (["--raw"], plain["response"]["body"]["choices"][0]["text"]),
        ([], answer["response"]["body"]["choices"][0]["message"]["content"]),
    ):
        options = ["--temperature", "0", "--max-tokens", "5", "--json", "--model", tiny]
        printed = run("generate", "hi", *options, *arguments)
        assert json.loads(printed.out)["completions"][0]["text"] == text
    entries = answer["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)
    assert "temperature='hot'" in bad["error"]["message"]


def test_run_batch_refuses_what_it_cannot_read_or_write(tiny, run, tmp_path):
    source = tmp_path / "in.jsonl"
    missing = run("run-batch", "-i", str(source), "-o", str(tmp_path / "out"), "--model", tiny)
    assert_refused(missing, "in.jsonl: no such file")
    source.write_text('{"prompt": "hi"}\n')
    folder = str(tmp_path / "none" / "out")
    assert_refused(run("run-batch", "-i", str(source), "-o", folder, "--model", tiny), "no folder")
