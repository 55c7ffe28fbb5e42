"""`jdet demo`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from jdet.cli.common import Dtype, Model, app, chat, check_writable, load, tokenizer_of
from jdet.io.resolve import DEFAULT_MODEL

_DEMO_PROMPT = "Tell me about Richard Feynman"
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


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
    check_writable(json_file)
    check_writable(plot)
    if plot is not None:
        _check_plot(plot)

    from rich.console import Console

    from jdet import demo_report, environment

    loaded = load(model, dtype, None)
    tokenizer = tokenizer_of(loaded)
    text = chat(loaded, prompt, raw=not tokenizer.has_chat_template)
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


def _check_plot(path: Path) -> None:
    import importlib.util

    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise ValueError(f"{path}: allowed endings of a plot: {', '.join(_PLOT_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib: pip install "jdet[plot]"')
