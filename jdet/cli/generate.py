"""`jdet generate`."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jdet.cli.common import Dtype, Model, app, chat, load, tokenizer_of
from jdet.io.resolve import DEFAULT_MODEL

if TYPE_CHECKING:
    from jdet.completion import Completion
    from jdet.models.load import LanguageModel


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
    loaded = load(model, dtype, implementation)
    text = chat(loaded, prompt, raw=raw)
    if as_json:
        completions = jdet.generate(loaded, [text], sampling)
        print(json.dumps(_generated(completions, model), ensure_ascii=False))
    else:
        _stream(loaded, text, sampling, logprobs)
    if sampling.seed != asked.seed:
        print(f"seed {sampling.seed}", file=sys.stderr)


def _stream(model: "LanguageModel", text: str, sampling: Any, logprobs: bool) -> None:
    """Prints the first sample as it comes and, once they are done, the others."""
    import numpy as np

    import jdet
    from jdet.text_stream import TextStream

    tokenizer = tokenizer_of(model)
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
