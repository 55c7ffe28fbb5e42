"""Random loads on the engine, every request compared bit for bit with its run alone.

    python scripts/soak_engine.py [--requests 10000] [--seed 0] [--json FILE]

A tiny model with random weights; requests arrive alone and in bursts, with prompts that begin
alike, parameters of every kind, and cancellations; the cache is too small for all of them.
Exit status 1 if any bit differs.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

import jdet
from jdet.engine.config import EngineConfig
from jdet.environment import device, versions
from jdet.models.config import DecoderConfig
from jdet.testing import soak, tiny_config

CONFIG = EngineConfig(
    max_batch_size=12,
    max_tokens_per_step=76,
    max_model_len=512,
    page_size=16,
    num_pages=48,
    chunk_sizes=(16, 64),
)


def main() -> int:
    """Run the soak; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation", default="portable")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = DecoderConfig.from_hf(tiny_config())
    model = jdet.random_model(config, implementation=args.implementation)
    start = time.perf_counter()
    with tqdm(total=args.requests, unit="request") as bar:
        found = soak(
            model,
            CONFIG,
            requests=args.requests,
            seed=args.seed,
            longest=300,
            max_tokens=40,
            done=bar.update,
        )
    report = {
        "requests": found.requests,
        "cancelled": found.cancelled,
        "mismatches": found.mismatches,
        "counts": vars(found.counts),
        "seconds": round(time.perf_counter() - start, 1),
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
