"""The engine under load against one request at a time, and against plain XLA.

    python scripts/bench/engine.py [--model M | --shape S] [--requests N] [--concurrent N]
        [--prompt LO HI] [--output LO HI] [--dtype D] [--json FILE]

One process; every engine is warmed up first. Lengths are drawn uniformly. Time to first token
is from submission, all requests being submitted at the start.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import jdet
from jdet import Engine, EngineConfig, SamplingParams
from jdet.environment import device, versions
from jdet.models.load import LanguageModel


def run(model: LanguageModel, config: EngineConfig, load: list[tuple[list[int], int]]) -> dict:
    """Serve the load once; warmed up."""
    engine = Engine(model, config)
    engine.warm_up()
    compiled = engine.compiles
    start = time.perf_counter()
    handles = [
        engine.submit(p, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True))
        for p, n in load
    ]
    waiting, first = list(handles), []
    while engine.step():
        now = time.perf_counter() - start
        first += [now for h in waiting if h.requests[0].token_ids]
        waiting = [h for h in waiting if not h.requests[0].token_ids]
    seconds = time.perf_counter() - start
    assert engine.compiles == compiled, "something was compiled after the warm-up"
    made = sum(n for _, n in load)
    return {
        "implementation": model.ops.implementation,
        "concurrent": engine.config.max_batch_size,
        "seconds": round(seconds, 2),
        "output_tokens_per_second": round(made / seconds, 1),
        "first_token_median_s": round(statistics.median(first), 3) if first else None,
        "programs": compiled,
        "counts": vars(engine.counts),
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", help="a published shape with random weights, in its place")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 128))
    parser.add_argument("--output", type=int, nargs=2, default=(16, 64))
    parser.add_argument("--tokens-per-step", type=int, default=512)
    parser.add_argument("--chunk-sizes", type=int, nargs="*")
    parser.add_argument("--one-at-a-time", type=int, default=8, help="requests of that run; 0: no")
    parser.add_argument("--xla", action="store_true", help="plain XLA too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = (
        jdet.random_model(args.shape, dtype=args.dtype)
        if args.shape
        else jdet.load(args.model, dtype=args.dtype)
    )
    rng = np.random.default_rng(0)
    load = [
        (
            rng.integers(0, model.config.vocab_size, rng.integers(*args.prompt, endpoint=True)),
            int(rng.integers(*args.output, endpoint=True)),
        )
        for _ in range(args.requests)
    ]
    load = [(prompt.tolist(), n) for prompt, n in load]

    def config(concurrent: int) -> EngineConfig:
        return EngineConfig(
            max_batch_size=concurrent,
            max_tokens_per_step=args.tokens_per_step,
            max_model_len=args.prompt[1] + args.output[1],
            chunk_sizes=tuple(args.chunk_sizes) if args.chunk_sizes else None,
            prefix_caching=False,
        )

    rows: list[dict[str, Any]] = [run(model, config(args.concurrent), load)]
    print(rows[-1], flush=True)
    if args.xla:
        plain = model.with_ops(implementation="xla")
        rows.append(run(plain, config(args.concurrent), load))
        print(rows[-1], flush=True)
    if args.one_at_a_time:
        rows.append(run(model, config(1), load[: args.one_at_a_time]))
        print(rows[-1], flush=True)
    report = {
        "rows": rows,
        "fingerprint": model.ops.fingerprint,
        "device": device(),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
