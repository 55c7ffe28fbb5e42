"""Whole models on one NVIDIA GPU: a request's bits alone against its bits in batches.

    python scripts/check_gpu_model.py [--implementation mosaic_gpu] [--json FILE]
        [--batches 5,33,256] [--only SmolLM2 Qwen3-8B ...] [--model PATH]

Models: of the widths of SmolLM2, Qwen3-8B, Llama-3.1-8B, Gemma-3-4B and Qwen3-30B-A3B, 3 layers
(Gemma 6, so that one has no window), random weights; with --model, real weights too. Requests of
1, 40, 253 and 601 tokens alone, against the same requests in batches among random neighbours,
with padding and unused cache slots poisoned; the same under plain XLA, which must fail. Exit
status 1 on a mismatch, or if plain XLA shows none.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import numpy as np
from timing import environment  # pyright: ignore[reportMissingImports]

import jdet
from jdet.models.config import CONFIGS, DecoderConfig
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams
from jdet.testing import compose, run_batch, same_bits, small_config

TOKENS = 6
LENGTHS = (1, 40, 253, 601)
WIDTH, CACHE = 640, 1024
MODELS = ("SmolLM2", "Qwen3-8B", "Llama-3.1-8B", "Gemma-3-4B", "Qwen3-30B-A3B")


def config_of(name: str) -> DecoderConfig:
    """The shape of a model, of few layers."""
    if name == "SmolLM2":
        return DecoderConfig.from_hf(small_config(layers=3))
    config = CONFIGS[name]
    if name == "Gemma-3-4B":  # shorter windows, so that prompts are longer than they
        windows = tuple(w and 200 for w in config.windows)
        return dataclasses.replace(config, num_hidden_layers=6, windows=windows)
    return dataclasses.replace(config, num_hidden_layers=3)


def in_batch(
    model: LanguageModel,
    batch_size: int,
    *,
    poison: bool,
    lengths: tuple[int, ...] = LENGTHS,
    width: int = WIDTH,
) -> list[Any]:
    """Results of the requests in one batch, at random rows; alone for batch_size 0."""
    vocab = model.config.vocab_size
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    requests = [(np.random.default_rng(n).integers(0, vocab, n).tolist(), greedy) for n in lengths]
    if batch_size == 0:
        # One shape for all: what varies is the batch.
        return [
            run_batch(model, [r], max_tokens=TOKENS, width=width, cache_length=CACHE)[0]
            for r in requests
        ]
    crowd = compose(
        batch_size,
        batch_size=batch_size - len(lengths) + 1,
        row=0,
        vocab_size=vocab,
        max_length=width,
        max_tokens=TOKENS,
    )
    requests += list(zip(map(list, crowd.neighbours), crowd.neighbour_sampling, strict=True))
    order = np.random.default_rng(batch_size).permutation(batch_size)
    out = run_batch(
        model,
        [requests[i] for i in order],
        max_tokens=TOKENS,
        width=width,
        cache_length=CACHE,
        cache_fill=float("nan") if poison else 0.0,
        poison_padding=poison,
    )
    return [out[int(np.argmax(order == i))] for i in range(len(lengths))]


def check_bits(name: str, model: LanguageModel, sizes: list[int]) -> dict[str, Any]:
    """Compare alone and in batches; plain XLA must differ somewhere."""
    start = time.perf_counter()
    alone = in_batch(model, 0, poison=False)
    row: dict[str, Any] = {"model": name, "implementation": model.ops.implementation}
    row["fingerprint"], row["mismatches"] = model.ops.fingerprint, {}
    for size in sizes:
        got = in_batch(model, size, poison=True)
        row["mismatches"][size] = sum(not same_bits(a, b) for a, b in zip(alone, got, strict=True))
    row["finite"] = all(len(ids) == TOKENS and np.isfinite(lp).all() for ids, lp in alone)
    row["sha256"] = hashlib.sha256(b"".join(lp.tobytes() for _, lp in alone)).hexdigest()
    plain = model.with_ops(implementation="xla")
    # XLA multiplies every token with every expert: few tokens for it.
    few = {"lengths": LENGTHS[:2], "width": 48} if model.config.num_experts else {}
    solo, crowd = (in_batch(plain, size, poison=False, **few) for size in (0, 33))
    row["xla_mismatches_at_33"] = sum(not same_bits(a, b) for a, b in zip(solo, crowd, strict=True))
    # Right, too: ours and plain XLA round differently, and agree about the first token.
    row["largest_first_logprob_difference_to_xla"] = float(
        max(
            abs(a[1][0] - b[1][0])
            for a, b in zip(alone[: len(solo)], solo, strict=True)
            if a[0][0] == b[0][0]
        )
    )
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--implementation", default="mosaic_gpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", default="5,33,256")
    parser.add_argument("--only", nargs="*", choices=MODELS)
    parser.add_argument("--model", help="real weights: a path or a name")
    args = parser.parse_args()
    sizes = [int(size) for size in args.batches.split(",")]
    result: dict[str, Any] = {
        **environment(),
        "bits": [],
    }
    implementation = args.implementation

    def models() -> Iterator[tuple[str, LanguageModel]]:
        for name in args.only if args.only is not None else MODELS:
            config = config_of(name)
            model = jdet.random_model(config, implementation=implementation)
            yield f"{name} widths, {config.num_hidden_layers} layers", model
        if args.model:
            yield Path(args.model).name, jdet.load(args.model, implementation=implementation)

    for name, model in models():
        row = check_bits(name, model, sizes)
        result["bits"].append(row)
        print(row, flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [
        r
        for r in result["bits"]
        if any(r["mismatches"].values()) or not r["finite"] or not r["xla_mismatches_at_33"]
    ]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
