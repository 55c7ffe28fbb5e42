"""`jdet run-batch` and `jdet convert`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from jdet.cli.common import Dtype, Model, app, check_writable, load
from jdet.io.resolve import DEFAULT_MODEL


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
    check_writable(target)
    from jdet.batch.runner import BatchRunner
    from jdet.engine.config import EngineConfig
    from jdet.engine.engine import Engine

    loaded = load(model, dtype, implementation)
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
