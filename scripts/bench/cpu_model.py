"""Decode step and prefill of SmolLM2-135M on a CPU: jdet's `portable` against plain XLA.

    python scripts/bench/cpu_model.py [--json FILE] [--repeats N]

Both implementations run the same model code on the same weights in the same process, in
turn (A B A B ...), so that a drift of the machine's speed meets both; `ratio` is the median
of the pairwise ratios. Wall clock, after a warm-up.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import jdet
from jdet.decoding import DecodeState, decode, prefill
from jdet.environment import cpu_name
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams, sampling_arrays

DECODE_BATCHES = (1, 8, 32)
CONTEXT = 200  # prompt length of the decode rows, inside one split of 256
PREFILLS = ((1, 512), (8, 128), (32, 64))
STEPS = 4


def decode_runner(model: LanguageModel, batch: int) -> Callable[[], float]:
    """A function that runs STEPS decode steps and returns seconds a step."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (batch, CONTEXT), dtype=np.int32)
    params = SamplingParams(temperature=0, max_tokens=10**6, ignore_eos=True)
    sampling = sampling_arrays([params] * batch)
    impl = model.ops.implementation
    first = jdet.jit(
        functools.partial(prefill, max_tokens=64, cache_length=512, ops=model.ops),
        implementation=impl,
    )
    more = jdet.jit(functools.partial(decode, ops=model.ops), implementation=impl)
    lengths = np.full(batch, CONTEXT, np.int32)
    state: DecodeState = first(model.decoder, prompts, lengths, sampling)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(more(model.decoder, state, sampling, STEPS).token_ids)
        return (time.perf_counter() - start) / STEPS

    return run


def prefill_runner(model: LanguageModel, batch: int, length: int) -> Callable[[], float]:
    """A function that runs one prefill and returns seconds."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (batch, length), dtype=np.int32)
    sampling = sampling_arrays([SamplingParams(temperature=0)] * batch)
    cache_length = -(-length // 256) * 256
    first = jdet.jit(
        functools.partial(prefill, max_tokens=1, cache_length=cache_length, ops=model.ops),
        implementation=model.ops.implementation,
    )
    lengths = np.full(batch, length, np.int32)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(first(model.decoder, prompts, lengths, sampling).token_ids)
        return time.perf_counter() - start

    return run


def compare(ours: Callable[[], float], xla: Callable[[], float], repeats: int) -> dict[str, float]:
    """Time the two in turn."""
    ours()
    xla()
    pairs = [(ours(), xla()) for _ in range(repeats)]
    return {
        "ours_ms": round(statistics.median(a for a, _ in pairs) * 1e3, 3),
        "xla_ms": round(statistics.median(b for _, b in pairs) * 1e3, 3),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default=",".join(map(str, DECODE_BATCHES)))
    parser.add_argument("--no-prefill", action="store_true")
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes.split(","):
        model = jdet.load(dtype=dtype, implementation="portable")
        plain = model.with_ops(implementation="xla")
        jobs = [
            ("decode", b, CONTEXT, functools.partial(decode_runner, batch=b))
            for b in map(int, args.batches.split(","))
        ]
        if not args.no_prefill:
            jobs += [
                ("prefill", b, n, functools.partial(prefill_runner, batch=b, length=n))
                for b, n in PREFILLS
            ]
        for what, batch, length, runner in jobs:
            figures = compare(runner(model), runner(plain), args.repeats)
            row = {"what": what, "dtype": dtype, "batch": batch, "length": length, **figures}
            rows.append(row)
            print(row, flush=True)
    result = {
        "device": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "command": "python scripts/bench/cpu_model.py",
        "repeats": args.repeats,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
