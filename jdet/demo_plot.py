"""The picture of the demo: where completions part. Needs matplotlib (the extra `plot`)."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jdet.demo import Experiment
from jdet.demo_report import TITLES, first_difference

# The first completion's colour, then one for every text that parts from another.
_FIRST = (0.80, 0.84, 0.88, 1.0)
_OTHERS = [colormaps["tab10"](i) for i in (0, 1, 2, 3, 4, 6, 8, 9)]


def branches(token_ids: np.ndarray) -> np.ndarray:
    """[completions, tokens] -> the variant each completion follows at each token.

    Variant 0 is the first completion. A completion follows the lowest variant whose tokens
    so far are its own, and is a new variant where it stands alone.
    """
    variants: list[np.ndarray] = []
    followed = np.zeros(token_ids.shape, np.int32)
    for row, ids in enumerate(token_ids):
        partings = [first_difference(ids, other) for other in variants]
        if None not in partings:
            variants.append(ids)
            partings.append(None)
        start = 0
        for variant, parting in enumerate(partings):
            end = token_ids.shape[1] if parting is None else parting
            if end > start:
                followed[row, start:end] = variant
                start = end
    return followed


def draw(experiment: Experiment, title: str) -> Figure:
    """One panel a mode, one row a completion, one column a token."""
    outcomes = experiment.outcomes
    completions = len(experiment.origins)
    followed = {mode: branches(outcome.token_ids) for mode, outcome in outcomes.items()}
    height = min(max(0.16 * completions, 2.2), 12.0)
    figure = Figure(figsize=(12, height + 1.6), layout="constrained")
    panels = figure.subplots(1, len(outcomes), sharey=True)
    figure.suptitle(title)
    for axes, (mode, variant) in zip(panels, followed.items(), strict=True):
        count = int(variant.max()) + 1
        axes.imshow(
            variant,
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap([_colour(v) for v in range(count)]),
            vmin=-0.5,
            vmax=count - 0.5,
            extent=(0.5, variant.shape[1] + 0.5, completions - 0.5, -0.5),
        )
        axes.set_title(f"{TITLES[mode]}: {completions} completions, {count} unique", fontsize=11)
        axes.set_xlabel("generated token")
        _mark_batches(axes, experiment)
    panels[0].set_ylabel("completions, by the batch they came in")
    count = max(int(v.max()) for v in followed.values()) + 1
    figure.legend(
        handles=[Patch(facecolor=_colour(v), label=_label(v)) for v in range(min(count, 9))],
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9,
    )
    return figure


def save(experiment: Experiment, path: Path, title: str) -> None:
    """Write the picture; the file's ending names its format."""
    draw(experiment, title).savefig(path, dpi=150)


def _colour(variant: int) -> tuple[float, float, float, float]:
    return _FIRST if variant == 0 else _OTHERS[(variant - 1) % len(_OTHERS)]


def _label(variant: int) -> str:
    return "as the first completion" if variant == 0 else f"another text ({variant})"


def _mark_batches(axes: Axes, experiment: Experiment) -> None:
    """A line between batches, and each batch's size beside its rows."""
    at, middles, labels = 0, [], []
    for batch in experiment.batches:
        count = len(batch.request_rows)
        middles.append(at + (count - 1) / 2)
        labels.append(f"batch of {len(batch.prompts)}")
        at += count
        axes.axhline(at - 0.5, color="white", linewidth=1.2)
    axes.set_yticks(middles, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
