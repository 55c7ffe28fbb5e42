"""The article's experiment in small: one prompt in many batches, on plain XLA and on jdet.

"Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab, 2025) asked a model 1000
times for "Tell me about Richard Feynman" at temperature 0 and had 80 different answers, the
first parting from the others at token 103. Here the request goes out in batches of several
sizes, among neighbours of random length, in several rows and paddings; each row that holds it
gives one completion.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jdet.compiler import jit
from jdet.decoding import generate_tokens
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingArrays, SamplingParams, sampling_arrays

# Batches up to this size are cheap and run twice, with other neighbours.
_TWICE_UP_TO = 4
# A batch size has a padding of its own: it has a compile of its own anyway.
_PADDING_STEP = 8


@dataclasses.dataclass(frozen=True)
class Batch:
    """One composition.

    Attributes:
      prompts: the rows' token ids.
      request_rows: the rows that hold the request; the others are its neighbours.
      width: columns of the prompt array; shorter prompts are padded to it.
    """

    prompts: tuple[tuple[int, ...], ...]
    request_rows: tuple[int, ...]
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns): what a compile is for."""
        return len(self.prompts), self.width

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded token ids [B, P] and lengths [B]."""
        tokens = np.zeros(self.shape, np.int32)
        for row, prompt in zip(tokens, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        return tokens, np.array([len(p) for p in self.prompts], np.int32)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one mode made of all batches; a row of the arrays is a completion.

    Attributes:
      token_ids: [completions, tokens] int32.
      logprobs: [completions, tokens] float32.
      generated: tokens that all rows generated, neighbours included.
      compile_seconds, run_seconds: wall time, apart.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    generated: int
    compile_seconds: float
    run_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Over run time, compiles left out."""
        return self.generated / self.run_seconds


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The batches that ran, and each mode's outcome ("xla" and "jdet")."""

    batches: tuple[Batch, ...]
    outcomes: dict[str, Outcome]

    @property
    def origins(self) -> list[tuple[int, int]]:
        """(index of the batch, row) of each completion."""
        return [(i, row) for i, batch in enumerate(self.batches) for row in batch.request_rows]


def compose_batches(
    prompt: Sequence[int],
    sizes: Sequence[int],
    *,
    seed: int,
    vocab_size: int,
    longest: int,
) -> tuple[Batch, ...]:
    """The compositions: half of a batch's rows hold the request (one at least).

    Neighbours are random token ids, 1 to `width` of them. `longest` bounds the width, so
    that prompt and completion fit the model's context.
    """
    rng = np.random.default_rng(seed)
    batches = []
    for i, size in enumerate(sizes):
        width = min(len(prompt) + i * _PADDING_STEP, longest)
        for _ in range(2 if 1 < size <= _TWICE_UP_TO else 1):
            own = sorted(rng.choice(size, max(1, size // 2), replace=False).tolist())
            prompts = [
                tuple(rng.integers(0, vocab_size, rng.integers(1, width + 1)).tolist())
                for _ in range(size)
            ]
            for row in own:
                prompts[row] = tuple(prompt)
            batches.append(Batch(tuple(prompts), tuple(own), width))
    return tuple(batches)


def run_experiment(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    sizes: Sequence[int],
    tokens: int,
    seed: int = 0,
    progress: bool = False,
) -> Experiment:
    """Complete `prompt` greedily in every batch, on plain XLA and on the model's own ops.

    Both modes run the same batches, in turn, so that a busy machine is busy for both. End
    tokens are ignored: every row has `tokens` tokens, and speeds compare.

    Raises:
      ValueError: a prompt that with `tokens` is over the context length; fewer than two
        completions; a model on plain XLA.
    """
    config = model.config
    longest = config.max_position_embeddings - tokens
    if not 1 <= len(prompt) <= longest:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, and tokens={tokens}; together at most "
            f"{config.max_position_embeddings}, the model's context length"
        )
    batches = compose_batches(
        prompt, sizes, seed=seed, vocab_size=config.vocab_size, longest=longest
    )
    if sum(len(b.request_rows) for b in batches) < 2:
        raise ValueError(f"batches={list(sizes)} give one completion; at least two can differ")
    if model.ops.implementation == "xla":
        raise ValueError("the model runs on plain XLA; load it with an invariant implementation")
    modes = {"xla": "xla", "jdet": model.ops.implementation}
    shapes = dict.fromkeys(b.shape for b in batches)
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {mode: [] for mode in modes}
    compiled, compile_seconds = {}, {}
    run_seconds, generated = dict.fromkeys(modes, 0.0), dict.fromkeys(modes, 0)
    steps = len(modes) * (len(shapes) + len(batches))
    with tqdm(total=steps, disable=not progress, unit="step", leave=False) as bar:
        for mode, implementation in modes.items():
            sizes_text = " ".join(str(size) for size, _ in shapes)
            bar.set_description(f"{mode}: compile, batch {sizes_text}")
            start = time.perf_counter()
            chosen = model.with_ops(implementation=implementation)
            compiled[mode] = _compile(chosen, list(shapes), tokens, bar.update)
            compile_seconds[mode] = time.perf_counter() - start
        for batch in batches:
            inputs = jax.device_put((*batch.arrays(), _sampling(len(batch.prompts), tokens)))
            for mode in modes:
                bar.set_description(f"{mode}: run, batch {len(batch.prompts)}")
                start = time.perf_counter()
                out = jax.device_get(compiled[mode][batch.shape](model.decoder, *inputs))
                run_seconds[mode] += time.perf_counter() - start
                generated[mode] += int(out.count.sum())
                own = list(batch.request_rows)
                rows[mode].append((out.token_ids[own], out.logprobs[own]))
                bar.update()
    outcomes = {
        mode: Outcome(
            token_ids=np.concatenate([ids for ids, _ in rows[mode]]),
            logprobs=np.concatenate([logprobs for _, logprobs in rows[mode]]),
            generated=generated[mode],
            compile_seconds=compile_seconds[mode],
            run_seconds=run_seconds[mode],
        )
        for mode in modes
    }
    return Experiment(batches, outcomes)


def _sampling(rows: int, tokens: int) -> SamplingArrays:
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return sampling_arrays([greedy] * rows)


def _compile(
    model: LanguageModel,
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    done: Callable[[], Any],
) -> dict[tuple[int, int], Callable[..., Any]]:
    """One executable a shape. XLA compiles on one core and without the GIL: all cores work."""
    function = jit(
        functools.partial(generate_tokens, ops=model.ops, max_tokens=tokens),
        implementation=model.ops.implementation,
    )
    compiled = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {}
        for rows, width in shapes:
            prompts, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
            lowered = function.lower(model.decoder, prompts, lengths, _sampling(rows, tokens))
            futures[pool.submit(lowered.compile)] = rows, width
        for future in as_completed(futures):
            compiled[futures[future]] = future.result()
            done()
    return compiled


def parse_sizes(text: str) -> list[int]:
    """Batch sizes from "1,2,4".

    Raises:
      ValueError: something else than integers from 1, separated by commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"batches={text!r}; allowed: integers from 1 separated by commas")
    return sorted({int(part) for part in parts})
