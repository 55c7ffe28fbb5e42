"""What the commands share: the app, options, and how a model is loaded."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jdet.models.load import LanguageModel

USER_ERROR = 2

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


def fail(message: object) -> int:
    """Says what the user can mend; the exit status."""
    # Our messages have two lines at most; a ValueError out of a library may have a page.
    shown = "\n".join(str(message).splitlines()[:2])
    print(f"jdet: error: {shown}", file=sys.stderr)
    return USER_ERROR


def load(model: str, dtype: str, implementation: str | None) -> "LanguageModel":
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


def tokenizer_of(model: "LanguageModel") -> Any:
    """A model's tokenizer, which text needs."""
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, so it takes no text")
    return model.tokenizer


def chat(model: "LanguageModel", prompt: str, *, raw: bool) -> str:
    """A prompt as the model's template has it, or as it is."""
    tokenizer = tokenizer_of(model)
    if raw:
        return prompt
    if not tokenizer.has_chat_template:
        raise ValueError(f"{model.name} has no chat template; --raw takes the prompt as it is")
    return tokenizer.chat_prompt([{"role": "user", "content": prompt}])


def check_writable(path: Path | None) -> None:
    """Finds out before minutes of work what would fail behind them."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is wanted")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path}: no permission to write")
