"""Engine bursts of exact sizes: needle requests among mates that all generate at once.

    python scripts/check_engine_bursts.py [--sizes 32 33 44 45 255 256 300] [--json FILE]
        [--model M | --shape S] [--implementation I] [--jobs N]

Needles of 1, 63, 255, 256 and 600 tokens stand at random places of a burst whose size is also the
engine's `max_batch_size`; the other requests have other lengths and sampling parameters. Each
needle's tokens and log-probs must have the bits of its run alone, and the engine must really have
had all of them in one step, have cut the longest prompt, and have mixed prompts with generation.
The same under plain XLA must differ somewhere. Exit status 1 otherwise. A process a size.
"""

import argparse
import gc
import json
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import jdet
from jdet import Engine, EngineConfig, SamplingParams
from jdet.environment import device, versions
from jdet.testing import compose, same_completions

LENGTHS = (1, 63, 255, 256, 600)
CHUNK, TOKENS = 64, 48
THREADS = 8


def check(job: dict[str, Any]) -> dict[str, Any]:
    """One burst: the needles that differ from their runs alone, and what the engine did."""
    start, size = time.perf_counter(), job["size"]
    model = (
        jdet.random_model(job["shape"], implementation=job["implementation"])
        if job["shape"]
        else jdet.load(job["model"], implementation=job["implementation"])
    )
    # A step fits 16 prompts, so that even the largest burst is soon generating.
    config = EngineConfig(
        max_batch_size=size,
        max_tokens_per_step=16 * CHUNK + size,
        max_model_len=1024,
        chunk_sizes=(CHUNK,),
        num_pages=size * 4 + 16 * len(LENGTHS),
        prefix_caching=False,
    )
    vocab = model.config.vocab_size
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    needles = [np.random.default_rng(n).integers(0, vocab, n).tolist() for n in LENGTHS]
    crowd = compose(
        size,
        batch_size=size - len(LENGTHS) + 1,
        row=0,
        vocab_size=vocab,
        max_length=40,
        max_tokens=TOKENS,
    )
    # The youngest prompt is read when the eldest still generates.
    mates = [
        SamplingParams(temperature=s.temperature, seed=s.seed, max_tokens=TOKENS, ignore_eos=True)
        for s in crowd.neighbour_sampling
    ]
    quiet = Engine(model, config, cache_fill=float("nan"))
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda job: job(), quiet.compile_jobs([greedy, *mates])))
    alone = [quiet.generate([needle], greedy, progress=False) for needle in needles]
    del quiet
    gc.collect()  # its cache, before another one is made
    requests = [(needle, greedy) for needle in needles]
    requests += list(zip(map(list, crowd.neighbours), mates, strict=True))
    order = np.random.default_rng(size).permutation(size)
    engine = Engine(model, config, cache_fill=float("nan"))
    found = engine.generate(
        [requests[i][0] for i in order], [requests[i][1] for i in order], progress=False
    )
    counts = engine.counts
    return {
        **job,
        "needles": len(needles),
        "differ": [
            LENGTHS[i]
            for i, solo in enumerate(alone)
            if not same_completions(solo, [found[int(np.argmax(order == i))]])
        ],
        "most_decodes": counts.most_decodes,
        "formed": counts.most_decodes == size
        and counts.unfinished_chunks > 0
        and counts.mixed_steps > 0
        and counts.preemptions == 0,
        "finite": all(np.isfinite(c.logprobs).all() for c in found),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    """Run the bursts; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=(32, 33, 44, 45, 255, 256, 300))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", help="a published shape with random weights, in its place")
    parser.add_argument("--implementation", help="default: what the device gets")
    parser.add_argument("--control", type=int, default=33, help="size of the burst on plain XLA")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    asked = [(size, args.implementation) for size in args.sizes] + [(args.control, "xla")]
    model = None if args.shape else args.model
    jobs = [
        {"size": size, "implementation": name, "model": model, "shape": args.shape}
        for size, name in asked
    ]
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(check, jobs):
            rows.append(row)
            print(row, flush=True)
    rows.sort(key=lambda row: (row["implementation"] == "xla", row["size"]))
    *ours, control = rows
    passed = all(r["formed"] and r["finite"] and not r["differ"] for r in ours)
    report = {
        "passed": passed and bool(control["differ"]),
        "rows": rows,
        "device": device(),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
