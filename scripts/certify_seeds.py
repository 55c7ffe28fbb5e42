"""False alarms of `certify`: a sound model with many seeds, none of which may find a difference.

    python scripts/certify_seeds.py [--seeds 10] [--trials 6] [--json FILE]

By default two layers of SmolLM2's widths with random weights. Exit status 1 if any run does not
pass.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import jax

import jdet
from jdet.certify import certify
from jdet.environment import device, versions
from jdet.models.config import DecoderConfig
from jdet.testing import small_config


def main() -> int:
    """Run certify with every seed; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=6, help="of each guarantee")
    parser.add_argument("--minutes", type=float, default=30, help="of each run, at most")
    parser.add_argument("--shape", help="a published shape in the place of the small one")
    parser.add_argument("--implementation")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = args.shape or DecoderConfig.from_hf(small_config())
    model = jdet.random_model(shape, implementation=args.implementation)
    # The schedules are the same in every run: compiled once.
    cache = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    rows = []
    for seed in range(args.seeds):
        found = certify(model, minutes=args.minutes, trials=args.trials, seed=seed)
        tested = [r for r in found.guarantees.values() if r.occurred]
        rows.append(
            {
                "seed": seed,
                "verdict": found.verdict,
                "trials": found.trials,
                "compositions": found.compositions,
                "comparisons": sum(r.comparisons for r in found.guarantees.values()),
                "formed": {r.name: r.occurred for r in tested},
                "mismatches": sum(r.mismatches for r in found.guarantees.values()),
                "schedules": found.schedules["verdict"],
                "plain_xla": found.control["said"],
                "seconds": round(found.seconds, 1),
            }
        )
        print(rows[-1], flush=True)
    report = {
        "passed": all(row["verdict"] == "PASS" for row in rows),
        "runs": rows,
        "model": model.name,
        "fingerprint": model.ops.fingerprint,
        "device": device(),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
