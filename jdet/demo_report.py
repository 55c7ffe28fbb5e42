"""The demo's figures: what the completions of each mode have in common, and a table of it."""

import os.path
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from jdet.demo import Experiment, Outcome

TITLES: Mapping[str, str] = {"xla": "plain XLA", "jdet": "jdet"}


def first_difference(a: np.ndarray, b: np.ndarray) -> int | None:
    """Index of the first token in which two completions differ; None where none does."""
    at = np.flatnonzero(a != b)
    return int(at[0]) if at.size else None


def summarize(outcome: Outcome) -> dict[str, Any]:
    """The figures of one mode.

    `first_divergence` counts tokens from 1, as the article does (103: the first 102 agree),
    and is None where all completions are one. `max_logprob_diff` is the largest over all
    pairs, up to and including the pair's first differing token: behind it the texts differ.

    Raises:
      FloatingPointError: a log-prob that is NaN or infinite, in which nothing can be compared.
    """
    ids, logprobs = outcome.token_ids, outcome.logprobs
    if not np.isfinite(logprobs).all():
        raise FloatingPointError("log-probs are not finite")
    # Completions of equal ids and bits add nothing to the pairs.
    distinct = {(i.tobytes(), p.tobytes()): (i, p) for i, p in zip(ids, logprobs, strict=True)}
    partings, largest = [], 0.0
    pairs = list(distinct.values())
    for a, (ids_a, logprobs_a) in enumerate(pairs):
        for ids_b, logprobs_b in pairs[a + 1 :]:
            parting = first_difference(ids_a, ids_b)
            end = ids.shape[1] if parting is None else parting + 1
            largest = max(largest, float(np.abs(logprobs_a[:end] - logprobs_b[:end]).max()))
            partings += [] if parting is None else [parting + 1]
    return {
        "completions": len(ids),
        "unique": len({row.tobytes() for row in ids}),
        "first_divergence": min(partings, default=None),
        "distinct_logprobs": len({row.tobytes() for row in logprobs}),
        "max_logprob_diff": largest,
        "tokens_per_second": outcome.tokens_per_second,
    }


def report(experiment: Experiment, decode: Callable[[list[int]], str] | None) -> dict[str, Any]:
    """Everything `--json` writes that the experiment knows (the caller adds the rest).

    Args:
      decode: token ids to text; the variants have no text without it.
    """
    outcomes = experiment.outcomes
    xla, jdet = outcomes["xla"], outcomes["jdet"]
    return {
        "xla": summarize(xla),
        "jdet": summarize(jdet),
        "slowdown": xla.tokens_per_second / jdet.tokens_per_second,
        "compile_seconds": {mode: o.compile_seconds for mode, o in outcomes.items()},
        "run_seconds": {mode: o.run_seconds for mode, o in outcomes.items()},
        "variants": {mode: variants(experiment, mode, decode) for mode in outcomes},
        "compositions": [
            {
                "batch_size": len(b.prompts),
                "width": b.width,
                "request_rows": list(b.request_rows),
                "prompt_lengths": [len(p) for p in b.prompts],
            }
            for b in experiment.batches
        ],
    }


def variants(
    experiment: Experiment, mode: str, decode: Callable[[list[int]], str] | None
) -> list[dict[str, Any]]:
    """The unique completions of a mode, the most frequent first, with the batches they came in."""
    groups: dict[bytes, list[int]] = {}
    ids = experiment.outcomes[mode].token_ids
    for i, row in enumerate(ids):
        groups.setdefault(row.tobytes(), []).append(i)
    origins = experiment.origins
    return [
        {
            "completions": len(members),
            "batch_sizes": sorted(
                {len(experiment.batches[origins[i][0]].prompts) for i in members}
            ),
            "token_ids": ids[members[0]].tolist(),
            "text": decode(ids[members[0]].tolist()) if decode else None,
        }
        for members in sorted(groups.values(), key=len, reverse=True)
    ]


def disagreement(experiment: Experiment) -> str | None:
    """Where jdet broke its promise: the first completion whose bits are not the first one's."""
    outcome = experiment.outcomes["jdet"]
    ids, logprobs = outcome.token_ids, outcome.logprobs.view(np.uint32)
    for i, (batch, row) in enumerate(experiment.origins):
        at = np.flatnonzero((ids[i] != ids[0]) | (logprobs[i] != logprobs[0]))
        if at.size:
            size, width = experiment.batches[batch].shape
            return (
                f"jdet's completions are not all one: composition {batch} (batch of {size}, "
                f"width {width}), row {row} differs\nfrom the first completion at token "
                f"{at[0] + 1} (log-prob {outcome.logprobs[i, at[0]]}, "
                f"there {outcome.logprobs[0, at[0]]})"
            )
    return None


def table(figures: Mapping[str, Any]) -> Table:
    """The comparison for people, from `report`."""
    lines: list[tuple[str, Callable[[str], str]]] = [
        ("completions", lambda mode: str(figures[mode]["completions"])),
        ("unique completions", lambda mode: str(figures[mode]["unique"])),
        (
            "first token at which they part",
            lambda m: str(figures[m]["first_divergence"] or "never"),
        ),
        ("distinct bit patterns of log-probs", lambda m: str(figures[m]["distinct_logprobs"])),
        ("largest log-prob difference", lambda m: f"{figures[m]['max_logprob_diff']:.3g}"),
        ("tokens per second", lambda m: f"{figures[m]['tokens_per_second']:.1f}"),
        ("seconds running", lambda m: f"{figures['run_seconds'][m]:.1f}"),
        ("seconds compiling", lambda m: f"{figures['compile_seconds'][m]:.1f}"),
    ]
    made = Table(caption=f"slowdown (plain XLA's speed over jdet's): {figures['slowdown']:.2f}")
    made.add_column("")
    for mode in TITLES:
        made.add_column(TITLES[mode], justify="right")
    for name, value in lines:
        made.add_row(name, *(value(mode) for mode in TITLES))
    return made


def partings(figures: Mapping[str, Any], *, width: int = 76, most: int = 6) -> list[str]:
    """A line for each of plain XLA's texts: how often, in which batches, how it goes on."""
    found = figures["variants"]["xla"]
    if len(found) < 2 or found[0]["text"] is None:
        return []
    shared = os.path.commonprefix([v["text"] for v in found])
    start = shared.rfind(" ") + 1  # whole words
    lines = []
    for variant in found[:most]:
        sizes = " ".join(map(str, variant["batch_sizes"]))
        line = f"{variant['completions']:4} in batches of {sizes}: … {variant['text'][start:]}"
        lines.append(line.replace("\n", " ")[:width])
    return ["Plain XLA's texts, from where they part:", *lines]
