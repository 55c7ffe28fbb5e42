"""`jdet env`."""

import json
from typing import Annotated

import typer

from jdet.cli.common import app, fail


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
        raise typer.Exit(fail(report["xla_flags"]["refusal"]))
