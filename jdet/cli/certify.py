"""`jdet certify`."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jdet.cli.common import app, check_writable
from jdet.io.resolve import DEFAULT_MODEL


@app.command()
def certify(
    model: Annotated[
        str | None, typer.Option(help="A .gguf file, a model folder, ORG/NAME, or the default.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="A published shape with random weights, in its place.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Of a shape, so many; default: all it has.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for all of it, loading too.")] = 5.0,
    guarantees: Annotated[
        str | None, typer.Option(help="Such as G1,G4; default: all that apply here.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and compositions.")] = 0,
    batch: Annotated[
        int | None, typer.Option(help="Requests at once; default: 16 on CPU, 64 elsewhere.")
    ] = None,
    trials: Annotated[
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
            model, shape, layers = (source.get(k) for k in ("model", "shape", "layers"))
        dtype = dtype or known["subject"]["dtype"]
        implementation = implementation or known["subject"]["implementation"]
    for path in (json_file, html):
        check_writable(path)
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
        trials=trials,
        dtype=dtype or "bfloat16",
        implementation=implementation,
        random_weights=shape is not None,
        layers=layers,
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
