"""The engine under load against one request at a time, and against plain XLA.

    python scripts/bench/engine.py [--model M | --shape S [--layers N]] [--requests N]
        [--concurrent N] [--load PROMPTS:OUTPUTS ...] [--dtype D] [--xla xla|cudnn] [--json FILE]

One process; every engine is warmed up first, and serves each load: `--load 16-128:16-64` draws
the lengths of prompts and outputs uniformly. Time to first token is from submission, all requests
being submitted at the start. On a GPU `busy` is the share of the time, over PROFILED steps in which
every row generates, in which some kernel or copy ran (from the profiler's trace, which slows the
host: what it says is at most what a run without it does). `full_step_ms` is the mean time of the
load's own such steps, and `floor_ms` their least: the bytes of the weights and of the cache that
they read over the measured copy rate. Programs are compiled in THREADS, but plain XLA's one after
another, as XLA times what it chooses from.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from cudnn_attention import CudnnOps  # pyright: ignore[reportMissingImports]
from timing import copy_rate, environment, events_of  # pyright: ignore[reportMissingImports]

import jdet
from jdet import Engine, EngineConfig, SamplingParams
from jdet.models.config import CONFIGS
from jdet.models.load import LanguageModel

PROFILED = 40  # steps
THREADS = 8
Load = list[tuple[list[int], int]]


def draw(model: LanguageModel, count: int, lengths: str) -> Load:
    """(prompt, tokens to generate) of each request of a load such as 16-128:1024."""
    ranges = [[int(n) for n in part.split("-")] for part in lengths.split(":")]
    (low, high), (least, most) = ((r[0], r[-1]) for r in ranges)
    rng = np.random.default_rng(0)
    sizes = rng.integers((low, least), (high, most), (count, 2), endpoint=True)
    vocab = model.config.vocab_size
    return [(rng.integers(0, vocab, n).tolist(), int(out)) for n, out in sizes]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def serve(engine: Engine, load: Load, floor_bytes: int, copy: float | None) -> dict[str, Any]:
    """Submit the load and wait for the last token."""
    compiled, start = engine.compiles, time.perf_counter()
    handles = [engine.submit(prompt, greedy(n)) for prompt, n in load]
    waiting, first, full, steps = list(handles), [], [], 0
    rows = engine.config.max_batch_size
    while engine.step():
        steps += 1
        now = time.perf_counter() - start
        first += [now for h in waiting if h.requests[0].token_ids]
        waiting = [h for h in waiting if not h.requests[0].token_ids]
        running = [h.requests[0] for h in handles if h.requests[0].slot is not None]
        if len(running) == rows and all(r.token_ids for r in running):
            full.append((steps, now, sum(r.known for r in running)))
    seconds = time.perf_counter() - start
    assert engine.compiles == compiled, "something was compiled after the warm-up"
    made = sum(n for _, n in load)
    row = {
        "implementation": type(engine.model.ops).__name__ + f"({engine.model.ops.implementation})",
        "concurrent": rows,
        "requests": len(load),
        "seconds": round(seconds, 2),
        "output_tokens_per_second": round(made / seconds, 1),
        "first_token_median_s": round(statistics.median(first), 3) if first else None,
        "first_token_last_s": round(max(first), 3) if first else None,
        "steps": steps,
        "preemptions": engine.counts.preemptions,
    }
    pairs = [(a, b) for a, b in itertools.pairwise(full) if b[0] == a[0] + 1]
    if copy is not None and pairs:
        times = [b[1] - a[1] for a, b in pairs]
        c = engine.model.decoder.config
        entry = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        floor = np.mean([floor_bytes + entry * known for _, (_, _, known) in pairs]) / copy
        row["full_steps"] = len(pairs)
        row["full_step_ms"] = round(float(np.mean(times)) * 1e3, 3)
        row["floor_ms"] = round(float(floor) * 1e3, 3)
        row["share_of_floor"] = round(row["floor_ms"] / row["full_step_ms"], 3)
    return row


def busy(engine: Engine, load: Load) -> float:
    """The share of time in which the device works, while every request generates."""
    # The first still generates when the last prompt has been read.
    handles = [engine.submit(prompt, greedy(len(load) + 2 * PROFILED)) for prompt, _ in load]
    while not all(h.requests[0].token_ids for h in handles):
        engine.step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                engine.step()
        spans = sorted((e.start_ns, e.start_ns + e.duration_ns) for e in events_of(folder))
    for handle in handles:
        engine.cancel(handle)
    while engine.step():
        pass
    worked, end = 0.0, spans[0][0]
    for begin, stop in spans:
        worked += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return round(worked / (end - spans[0][0]), 4)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", help="a published shape with random weights, in its place")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--load", nargs="+", default=["16-128:16-64"], help="prompts:outputs")
    parser.add_argument("--tokens-per-step", type=int, default=512)
    parser.add_argument("--chunk-sizes", type=int, nargs="*")
    parser.add_argument("--chunk-rows", type=int, nargs="*")
    parser.add_argument("--decode-rows", type=int, nargs="*", help="fewer programs to compile")
    parser.add_argument("--num-pages", type=int)
    parser.add_argument("--one-at-a-time", type=int, default=8, help="requests of that run; 0: no")
    parser.add_argument(
        "--xla",
        choices=("xla", "cudnn"),
        help="plain XLA too: with its own attention, or with cuDNN's (prompts of one chunk)",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    copy = copy_rate() if gpu else None
    if args.shape:
        config = CONFIGS[args.shape]
        layers = args.layers or config.num_hidden_layers
        config = dataclasses.replace(config, num_hidden_layers=layers)
        model = jdet.random_model(config, dtype=args.dtype)
    else:
        model = jdet.load(args.model, dtype=args.dtype)
    loads = {name: draw(model, args.requests, name) for name in args.load}
    longest = max(len(p) + n for load in loads.values() for p, n in load)
    paged = args.concurrent * -(-longest // EngineConfig.page_size)
    if args.xla == "cudnn" and (args.num_pages, args.decode_rows) != (paged, [args.concurrent]):
        parser.error(
            "cuDNN reads pages where there are as many as the rows have room for, and gathers them "
            f"elsewhere: give --num-pages {paged} --decode-rows {args.concurrent}"
        )
    weights = sum(x.nbytes for x in jax.tree.leaves(model.decoder))
    if not model.config.tie_word_embeddings:
        weights -= model.decoder.embedding[...].nbytes
    report: dict[str, Any] = {
        **environment(),
        "model": f"{args.shape} (random weights)" if args.shape else args.model,
        "layers": model.config.num_hidden_layers,
        "fingerprint": model.ops.fingerprint,
        "copy_bytes_per_s": copy,
        "rows": [],
    }

    def run(model: LanguageModel, concurrent: int, count: int | None = None) -> None:
        engine = Engine(
            model,
            EngineConfig(
                max_batch_size=concurrent,
                max_tokens_per_step=args.tokens_per_step,
                max_model_len=longest,
                num_pages=args.num_pages,
                chunk_sizes=tuple(args.chunk_sizes) if args.chunk_sizes else None,
                chunk_rows=tuple(args.chunk_rows) if args.chunk_rows else None,
                decode_rows=tuple(args.decode_rows) if args.decode_rows else None,
                prefix_caching=False,
            ),
        )
        start = time.perf_counter()
        with ThreadPoolExecutor(1 if model.ops.implementation == "xla" else THREADS) as threads:
            list(threads.map(lambda job: job(), engine.compile_jobs([greedy(1)])))
        engine.warm_up([greedy(1)])
        warm_up = round(time.perf_counter() - start, 1)
        for name, load in loads.items():
            row = {"load": name, **serve(engine, load[:count], weights, copy)}
            row |= {"warm_up_s": warm_up, "programs": engine.compiles}
            if gpu and count is None:
                row["busy"] = busy(engine, load[:concurrent])
            report["rows"].append(row)
            print(row, flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        del engine
        gc.collect()  # its cache, before another one is made

    run(model, args.concurrent)
    if args.xla:
        plain = model.with_ops(implementation="xla")
        if args.xla == "cudnn":
            plain = dataclasses.replace(plain, ops=CudnnOps("xla", plain.ops.contract))
        run(plain, args.concurrent)
    if args.one_at_a_time:
        run(model, 1, args.one_at_a_time)
    return 0


if __name__ == "__main__":
    sys.exit(main())
