"""The command line: `jdet demo`, `generate`, `run-batch`, `convert`, `certify`, `env`.

jax is imported inside the commands: `jdet --help` and a mistyped option answer at once.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jdet.io.resolve import DEFAULT_MODEL

if TYPE_CHECKING:
    from jdet.completion import Completion
    from jdet.models.load import LanguageModel

USER_ERROR = 2
_DEMO_PROMPT = "Tell me about Richard Feynman"
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")

app = typer.Typer(
    help="Bitwise batch-invariant LLM inference in JAX.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Option(help="A .gguf file, a model folder, ORG/NAME of a hub, or the default.")
]
Dtype = Annotated[str, typer.Option(help="Of weights, activations and cache: bfloat16, float32.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 2 for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # Not standalone: typer would frame its own errors, and exit.
        return app(arguments or ["--help"], prog_name="jdet", standalone_mode=False) or 0
    except (ValueError, NotImplementedError, OSError) as error:
        return _fail(error)
    except Exception as error:
        # click's usage errors: typer has a click of its own, and exports no base class.
        if message := getattr(error, "format_message", None):
            return _fail(message())
        from jdet.compiler import EnvironmentRefused

        if isinstance(error, EnvironmentRefused):
            return _fail(error)
        raise


def _fail(message: object) -> int:
    # Our messages have two lines at most; a ValueError out of a library may have a page.
    shown = "\n".join(str(message).splitlines()[:2])
    print(f"jdet: error: {shown}", file=sys.stderr)
    return USER_ERROR


@app.command()
def demo(
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[str, typer.Option(help="What every batch asks.")] = _DEMO_PROMPT,
    tokens: Annotated[int, typer.Option(help="Tokens a completion.")] = 64,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,2,3,8,32",
    dtype: Dtype = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of neighbours and rows.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", readable=False, help="Write all figures here.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(readable=False, help="Draw where completions part: .png, .svg, .pdf."),
    ] = None,
) -> None:
    """One prompt in many batches at temperature 0: plain XLA against jdet.

    Exit status 1 if jdet's completions are not all one, bit for bit.
    """
    from jdet.demo import parse_sizes, run_experiment

    sizes = parse_sizes(batches)
    if tokens < 1:
        raise ValueError(f"tokens={tokens}; allowed: integers from 1")
    if seed < 0:
        raise ValueError(f"seed={seed}; allowed: integers from 0")
    if not prompt:
        raise ValueError("the prompt is empty")
    _check_writable(json_file)
    _check_writable(plot)
    if plot is not None:
        _check_plot(plot)

    from rich.console import Console

    from jdet import demo_report, environment

    loaded = _load(model, dtype, None)
    tokenizer = _tokenizer(loaded)
    text = _chat(loaded, prompt, raw=not tokenizer.has_chat_template)
    experiment = run_experiment(
        loaded, tokenizer.encode(text), sizes=sizes, tokens=tokens, seed=seed, progress=True
    )
    report = demo_report.report(experiment, tokenizer.decode)
    report |= {
        "fingerprint": loaded.ops.fingerprint,
        "versions": environment.versions(),
        "device": environment.device(),
        "arguments": {
            "model": model,
            "prompt": prompt,
            "tokens": tokens,
            "batches": sizes,
            "dtype": dtype,
            "seed": seed,
        },
    }
    # First, so that figures are not lost where a file cannot be written after all.
    Console().print(demo_report.table(report))
    for line in demo_report.partings(report):
        print(line)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        from jdet import demo_plot

        title = f"“{prompt}” at temperature 0, {dtype}: where completions part"
        demo_plot.save(experiment, plot, title)
    if broken := demo_report.disagreement(experiment):
        print(f"jdet: error: {broken}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to complete.")],
    model: Model = DEFAULT_MODEL,
    seed: Annotated[
        int | None, typer.Option(help="0..2**64-1; drawn, and reported, without it.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the most probable token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Smallest set of this probability; 1: off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="So many most probable tokens; 0: off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Of the best one's probability; 0: off.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    n: Annotated[int, typer.Option(help="Samples, each with its own noise.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End here; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Do not end at end tokens.")] = False,
    logprobs: Annotated[bool, typer.Option(help="List tokens and log-probs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    raw: Annotated[bool, typer.Option(help="The prompt as it is, no chat template.")] = False,
    dtype: Dtype = "bfloat16",
    implementation: Annotated[
        str | None, typer.Option(help="Default: the invariant one of this device.")
    ] = None,
) -> None:
    """Complete a prompt; the text is printed as it comes."""
    if not prompt:
        raise ValueError("the prompt is empty")

    import jdet

    asked = jdet.SamplingParams(
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    sampling = asked.with_seed()
    loaded = _load(model, dtype, implementation)
    text = _chat(loaded, prompt, raw=raw)
    if as_json:
        completions = jdet.generate(loaded, [text], sampling)
        print(json.dumps(_generated(completions, model), ensure_ascii=False))
    else:
        _stream(loaded, text, sampling, logprobs)
    if sampling.seed != asked.seed:
        print(f"seed {sampling.seed}", file=sys.stderr)


@app.command("run-batch")
def run_batch(
    source: Annotated[
        Path, typer.Option("--input", "-i", readable=False, help="Requests, one JSON a line.")
    ],
    target: Annotated[
        Path, typer.Option("--output", "-o", readable=False, help="Results, in the same order.")
    ],
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bfloat16",
    max_batch_size: Annotated[int, typer.Option(help="Requests that run at once.")] = 32,
    max_tokens_per_step: Annotated[int, typer.Option(help="Rows a step computes.")] = 512,
    max_model_len: Annotated[
        int, typer.Option(help="Tokens of prompt and completion together, at most.")
    ] = 4096,
    implementation: Annotated[
        str | None, typer.Option(help="Default: the invariant one of this device.")
    ] = None,
) -> None:
    """Run a file of requests: OpenAI's batch format, or {"prompt": ...} lines.

    A result depends on its own line alone. A run that was killed goes on where it ended when it
    is started again. Lines without max_tokens get 128 tokens at most; a line that cannot be
    served has its error in its result.
    """
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    _check_writable(target)
    from jdet.batch.runner import BatchRunner
    from jdet.engine.config import EngineConfig
    from jdet.engine.engine import Engine

    loaded = _load(model, dtype, implementation)
    config = EngineConfig(
        max_batch_size=max_batch_size,
        max_tokens_per_step=max_tokens_per_step,
        max_model_len=min(max_model_len, loaded.config.max_position_embeddings),
    )
    summary = BatchRunner(Engine(loaded, config), model, dtype).run(source, target)
    print(
        f"{target}: {summary.written + summary.found} results, {summary.found} of them from an "
        f"earlier run; {summary.failed} of this run's lines failed",
        file=sys.stderr,
    )


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A .gguf file, a model folder, or ORG/NAME.")],
    out: Annotated[Path, typer.Argument(readable=False, help="The folder to make.")],
    dtype: Dtype = "bfloat16",
) -> None:
    """Write a model as an Orbax checkpoint: it loads faster, with the same bits.

    OUT gets its name when it is whole; a run that was killed leaves OUT.partial, which the next
    one replaces.
    """
    import jdet

    jdet.convert(model, out, dtype=dtype, progress=sys.stderr.isatty())
    print(f"{out}: {model} in {dtype}", file=sys.stderr)


@app.command()
def certify(
    model: Annotated[
        str | None, typer.Option(help="A .gguf file, a model folder, ORG/NAME, or the default.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="A published shape with random weights, in its place.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for all of it, loading too.")] = 5.0,
    guarantees: Annotated[
        str | None, typer.Option(help="Such as G1,G4; default: all that apply here.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and compositions.")] = 0,
    batch: Annotated[
        int | None, typer.Option(help="Requests at once; default: 16 on CPU, 64 elsewhere.")
    ] = None,
    compositions: Annotated[
        int | None, typer.Option(help="Of each guarantee; default: as many as there is time for.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 (default) or float32.")] = None,
    implementation: Annotated[
        str | None, typer.Option(help="Default: the invariant one of this device.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(readable=False, help="A report's compositions again.")
    ] = None,
    other: Annotated[
        Path | None, typer.Option(readable=False, help="A report of another card, for G11.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", readable=False, help="Write the report here.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(readable=False, help="Write the report as a page here.")
    ] = None,
) -> None:
    """Prove the promise on this device: random compositions against runs alone, bit for bit.

    Exit status 0 only if all that was asked for passed.
    """
    if model is not None and shape is not None:
        raise ValueError("--model and --shape: give one of them")
    known = _report(replay, "--replay")
    if known is not None:
        if guarantees is not None or seed or batch is not None:
            raise ValueError("--replay takes seed, batch and guarantees from the report")
        if shape is None and model is None:
            source = known["settings"]["source"]
            model, shape = source["model"], source["shape"]
        dtype = dtype or known["subject"]["dtype"]
        implementation = implementation or known["subject"]["implementation"]
    for path in (json_file, html):
        _check_writable(path)
    # Before jax starts: the second process needs some of a GPU's memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    from rich.console import Console

    from jdet import environment
    from jdet.certify import certify as run
    from jdet.certify.page import render

    environment.device()
    found = run(
        shape or model or DEFAULT_MODEL,
        minutes=minutes,
        guarantees=None if guarantees is None else guarantees.replace(" ", "").split(","),
        seed=seed,
        batch=batch,
        compositions=compositions,
        dtype=dtype or "bfloat16",
        implementation=implementation,
        random_weights=shape is not None,
        replay=known,
        other=_report(other, "--other"),
    )
    found.settings["command"] = shlex.join(["jdet", *sys.argv[1:]])
    if json_file is not None:
        json_file.write_text(found.dumps() + "\n", encoding="utf-8")
    if html is not None:
        html.write_text(render(found.to_json(), str(json_file or "")), encoding="utf-8")
    Console().print(found.table())
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions, device, the mode in force, the contract and its fingerprint.

    Exit status 2 if XLA_FLAGS holds a flag against the promise.
    """
    from jdet import environment

    report = environment.describe()
    print(json.dumps(report, indent=1) if as_json else environment.as_text(report))
    if not report["xla_flags"]["accepted"]:
        raise typer.Exit(_fail(report["xla_flags"]["refusal"]))


def _load(model: str, dtype: str, implementation: str | None) -> "LanguageModel":
    """Loads a model once flags and device are known to be good."""
    import jdet
    from jdet import environment
    from jdet.compiler import check_environment

    if implementation != "xla":
        check_environment()
    environment.device()
    return jdet.load(
        model, dtype=dtype, implementation=implementation, progress=sys.stderr.isatty()
    )


def _tokenizer(model: "LanguageModel") -> Any:
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, so it takes no text")
    return model.tokenizer


def _chat(model: "LanguageModel", prompt: str, *, raw: bool) -> str:
    tokenizer = _tokenizer(model)
    if raw:
        return prompt
    if not tokenizer.has_chat_template:
        raise ValueError(f"{model.name} has no chat template; --raw takes the prompt as it is")
    return tokenizer.chat_prompt([{"role": "user", "content": prompt}])


def _check_writable(path: Path | None) -> None:
    """Finds out before minutes of work what would fail behind them."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is wanted")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path}: no permission to write")


def _report(path: Path | None, option: str) -> dict[str, Any] | None:
    """A report that `jdet certify --json` wrote."""
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"guarantees", "sha256"} <= found.keys() or "source" not in found["settings"]:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{option} {path}: not a report of jdet certify --json") from None
    return found


def _check_plot(path: Path) -> None:
    import importlib.util

    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise ValueError(f"{path}: allowed endings of a plot: {', '.join(_PLOT_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib: pip install "jdet[plot]"')


def _stream(model: "LanguageModel", text: str, sampling: Any, logprobs: bool) -> None:
    """Prints the first sample as it comes and, once they are done, the others."""
    import numpy as np

    import jdet
    from jdet.text_stream import TextStream

    tokenizer = _tokenizer(model)
    stream = TextStream(tokenizer.stream_decoder(), sampling.stop)
    if sampling.n > 1:
        print(f"--- sample 0 of {sampling.n}")

    def show(prompt_index: int, sample_index: int, token_ids: list[int]) -> None:
        if sample_index == 0:
            print(stream.push(token_ids), end="", flush=True)

    completions = jdet.generate(model, [text], sampling, on_tokens=show, steps_per_call=1)
    for completion in completions:
        if completion.sample_index:
            print(f"--- sample {completion.sample_index} of {sampling.n}")
            print(completion.text)
        else:
            print(stream.finish(completion.text))
        if logprobs:
            # As float32: its shortest digits, not those of the double that holds it.
            for token, value in zip(completion.token_ids, completion.logprobs, strict=True):
                piece = tokenizer.decode([token], skip_special=False)
                print(f"{piece!r}\t{token}\t{np.float32(value)}")


def _generated(completions: "Sequence[Completion]", model: str) -> dict[str, Any]:
    from jdet import environment

    wanted = ("text", "token_ids", "logprobs", "finish_reason", "seed", "sample_index")
    return {
        "completions": [
            {name: getattr(c, name) for name in (*wanted, "fingerprint")} for c in completions
        ],
        "model": model,
        "versions": environment.versions(),
        "device": environment.device(),
    }
