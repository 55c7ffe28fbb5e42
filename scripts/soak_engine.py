"""Random loads on the engine, every request compared bit for bit with its run alone.

    python scripts/soak_engine.py [--requests 10000] [--seed 0] [--json FILE]
        [--model M | --shape S] [--max-batch-size N] [--num-pages N] [--longest N] ...

By default a tiny model with random weights. Requests arrive alone and in bursts, with prompts
that begin alike, parameters of every kind, and cancellations; the cache is too small for all.
Exit status 1 if any bit differs.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import jdet
from jdet import Engine
from jdet.engine.config import EngineConfig
from jdet.environment import device, versions
from jdet.models.config import DecoderConfig
from jdet.testing import soak, tiny_config

THREADS = 8


def main() -> int:
    """Run the soak; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="real weights in place of the tiny model's")
    parser.add_argument("--shape", help="a published shape with random weights in its place")
    parser.add_argument("--implementation")
    parser.add_argument("--max-batch-size", type=int, default=12)
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=(16, 64))
    parser.add_argument("--num-pages", type=int, default=48)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--longest", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--every", type=float, default=0.25, help="bursts a step")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then none is sent")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model:
        model = jdet.load(args.model, implementation=args.implementation)
    else:
        shape = args.shape or DecoderConfig.from_hf(tiny_config())
        model = jdet.random_model(shape, implementation=args.implementation)
    config = EngineConfig(
        max_batch_size=args.max_batch_size,
        max_tokens_per_step=args.chunk_sizes[-1] + args.max_batch_size,
        max_model_len=-(-(args.longest + args.max_tokens) // args.page_size) * args.page_size,
        page_size=args.page_size,
        num_pages=args.num_pages,
        chunk_sizes=tuple(args.chunk_sizes),
    )
    start = time.perf_counter()
    # What the engines of the soak need: they share their programs.
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda job: job(), Engine(model, config).compile_jobs()))
    compiled = time.perf_counter() - start
    with tqdm(total=args.requests, unit="request") as bar:
        found = soak(
            model,
            config,
            requests=args.requests,
            seed=args.seed,
            longest=args.longest,
            max_tokens=args.max_tokens,
            every=args.every,
            seconds=args.seconds,
            done=bar.update,
        )
    report = {
        "requests": found.requests,
        "cancelled": found.cancelled,
        "mismatches": found.mismatches,
        "counts": vars(found.counts),
        "seconds": round(time.perf_counter() - start, 1),
        "warm_up_s": round(compiled, 1),
        "fingerprint": model.ops.fingerprint,
        "device": device(),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    return bool(found.mismatches)


if __name__ == "__main__":
    sys.exit(main())
