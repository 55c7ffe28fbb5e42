"""The demo: its compositions, its figures, and its verdict on a model small enough to test."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models as token_models
from tokenizers import pre_tokenizers

import jdet
from jdet import demo, demo_plot, demo_report
from jdet.cli import main
from jdet.io.tokenizer import Tokenizer
from jdet.models.config import DecoderConfig
from jdet.models.load import LanguageModel
from jdet.testing import small_config, tiny_config

PROMPT = "tell me about richard feynman"
SIZES, TOKENS = [1, 2, 8], 8
FIGURES = {
    *("completions", "unique", "first_divergence"),
    *("distinct_logprobs", "max_logprob_diff", "tokens_per_second"),
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """SmolLM2's widths, one layer, random weights, a word a token."""
    vocabulary = {word: i for i, word in enumerate([*PROMPT.split(), "<unk>"])}
    backend = tokenizers.Tokenizer(token_models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(
        backend, bos_to_add=None, eos_token_ids=[], chat_template=None, source="test"
    )
    config = DecoderConfig.from_hf(small_config(layers=1, vocab_size=512))
    return dataclasses.replace(jdet.random_model(config, dtype="bfloat16"), tokenizer=tokenizer)


def run_cli(model, *arguments: str) -> int:
    sizes = ",".join(map(str, SIZES))
    asked = ["--prompt", PROMPT, "--tokens", str(TOKENS), "--batches", sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jdet, "load", lambda *args, **kwargs: model)
        return main(["demo", *asked, *arguments])


@dataclasses.dataclass
class Ran:
    status: int
    out: str
    err: str
    figures: dict
    picture: bytes
    experiment: demo.Experiment


@pytest.fixture(scope="module")
def ran(model, tmp_path_factory) -> Ran:
    """The command, run once for all tests; it compiles for most of a minute."""
    folder = tmp_path_factory.mktemp("demo")
    experiments = []

    def keep(*args, **kwargs):
        experiments.append(run(*args, **kwargs))
        return experiments[0]

    run = demo.run_experiment
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr(demo, "run_experiment", keep)
        files = ["--json", str(folder / "demo.json"), "--plot", str(folder / "demo.png")]
        status = run_cli(model, *files)
    return Ran(
        status,
        out.getvalue(),
        err.getvalue(),
        json.loads((folder / "demo.json").read_text()),
        (folder / "demo.png").read_bytes(),
        experiments[0],
    )


@pytest.fixture
def experiment(ran) -> demo.Experiment:
    return ran.experiment


def test_compositions_are_what_they_claim(experiment):
    sizes = [len(batch.prompts) for batch in experiment.batches]
    assert sizes == [1, 2, 2, 8]
    request = experiment.batches[0].prompts[0]
    for batch in experiment.batches:
        held = [row for row, prompt in enumerate(batch.prompts) if prompt == request]
        assert held == list(batch.request_rows)
        assert all(1 <= len(prompt) <= batch.width for prompt in batch.prompts)
    # Other neighbours and lengths in batches of one shape, other paddings between shapes.
    assert len({batch.prompts for batch in experiment.batches}) == len(sizes)
    assert len({batch.width for batch in experiment.batches}) == len(SIZES)
    assert len(experiment.batches[-1].request_rows) == 4


def test_plain_xla_parts_and_jdet_does_not(experiment):
    figures = demo_report.report(experiment, None)
    assert figures["xla"]["completions"] == figures["jdet"]["completions"] == 7
    assert figures["xla"]["distinct_logprobs"] > 1
    assert figures["xla"]["max_logprob_diff"] > 0
    assert figures["jdet"] | {"tokens_per_second": 0} == {
        "completions": 7,
        "unique": 1,
        "first_divergence": None,
        "distinct_logprobs": 1,
        "max_logprob_diff": 0.0,
        "tokens_per_second": 0,
    }
    assert demo_report.disagreement(experiment) is None
    # Every row, neighbours too, made all its tokens: the speeds compare.
    assert all(o.generated == 13 * TOKENS for o in experiment.outcomes.values())


def test_command(ran, model):
    assert ran.status == 0, ran.err
    assert "unique completions" in ran.out and "slowdown" in ran.out
    assert "jdet: run, batch 8" in ran.err  # the progress bar
    written = ran.figures
    assert written["xla"].keys() == written["jdet"].keys() == FIGURES
    assert {"slowdown", "fingerprint", "versions", "device"} <= written.keys()
    speeds = [written[mode]["tokens_per_second"] for mode in ("xla", "jdet")]
    assert written["slowdown"] == speeds[0] / speeds[1]
    assert written["fingerprint"] == model.ops.fingerprint
    assert ran.picture.startswith(b"\x89PNG")


def test_command_fails_where_jdet_differs(experiment, model, monkeypatch, capsys):
    outcomes = experiment.outcomes
    broken = dataclasses.replace(experiment, outcomes=outcomes | {"jdet": outcomes["xla"]})
    monkeypatch.setattr(demo, "run_experiment", lambda *args, **kwargs: broken)
    assert run_cli(model) == 1
    message = capsys.readouterr().err
    assert "jdet's completions are not all one: composition 1 (batch of 2" in message


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["--json", "."], "is a folder"),
        (["--json", "/proc/version/x.json"], "there is no folder /proc/version"),
        (["--plot", "x.txt"], "allowed endings"),
        (["--batches", "1,two"], "batches='1,two'"),
        (["--batches", "0"], "batches='0'"),
        (["--batches", ""], "batches=''"),
        (["--batches", "1"], "one completion"),
        (["--tokens", "0"], "tokens=0"),
        (["--tokens", "2048"], "together at most 2048"),
        (["--seed", "-1"], "seed=-1"),
        (["--prompt", ""], "the prompt is empty"),
    ],
)
def test_bad_arguments(arguments, expected, model, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_compile", lambda *args: pytest.fail("refused too late"))
    assert run_cli(model, *arguments) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.err.startswith("jdet: error: ")
    assert len(printed.err.strip().splitlines()) <= 2 and printed.out == ""


def test_unwritable_file(model, monkeypatch, capsys, tmp_path):
    file = tmp_path / "demo.json"
    file.write_text("keep")
    # Root may write anywhere, so the system's answer is replaced rather than provoked.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != file)
    assert run_cli(model, "--json", str(file)) == 2
    assert "no permission to write" in capsys.readouterr().err
    assert file.read_text() == "keep"


def outcome(token_ids, logprobs) -> demo.Outcome:
    return demo.Outcome(np.array(token_ids, np.int32), np.array(logprobs, np.float32), 6, 1.0, 2.0)


def test_figures_of_known_completions():
    figures = demo_report.summarize(
        outcome(
            [[5, 6, 7], [5, 6, 7], [5, 8, 7], [5, 6, 9]],
            # The third's last differs by 9 behind the parting, which must not count.
            [[-1, -2, -3], [-1, -2, -3.5], [-1.25, -2.25, -12], [-1, -2, -3]],
        )
    )
    assert figures == {
        "completions": 4,
        "unique": 3,
        "first_divergence": 2,
        "distinct_logprobs": 3,
        "max_logprob_diff": 0.5,
        "tokens_per_second": 3.0,
    }


def test_a_model_on_plain_xla_is_refused():
    model = jdet.random_model(DecoderConfig.from_hf(tiny_config()), implementation="xla")
    with pytest.raises(ValueError, match="plain XLA"):
        demo.run_experiment(model, [1, 2], tokens=2, sizes=(1, 2))


def test_log_probs_that_are_no_numbers_are_no_success():
    with pytest.raises(FloatingPointError):
        demo_report.summarize(outcome([[5], [5]], [[np.nan], [np.nan]]))


def test_branches():
    ids = np.array([[5, 6, 7], [5, 6, 7], [5, 8, 7], [5, 8, 1], [4, 8, 7]], np.int32)
    expected = [[0, 0, 0], [0, 0, 0], [0, 1, 1], [0, 1, 2], [3, 3, 3]]
    assert demo_plot.branches(ids).tolist() == expected


def test_partings_show_whole_words():
    texts = ["He was born in 1945 in", "He was born in 1940. He"]
    found = [
        {"text": text, "completions": 3 - i, "batch_sizes": [1, 2]} for i, text in enumerate(texts)
    ]
    lines = demo_report.partings({"variants": {"xla": found}})
    assert lines[1:] == [
        "   3 in batches of 1 2: … 1945 in",
        "   2 in batches of 1 2: … 1940. He",
    ]
    assert demo_report.partings({"variants": {"xla": found[:1]}}) == []
