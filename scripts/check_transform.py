"""Random programs through `jdet.batch_invariant`: rows must keep their bits at every batch size.

    python scripts/check_transform.py --programs 500 --json scripts/bench/results/F.json

Each program (`jdet.testing.programs`) runs at several batch sizes, its row at several places
among random neighbours, with the gradient of its input (taken outside of the transformation).
Bits of the row are compared to those of the row alone, values to those of the original. The
control counts the originals that move.
"""

import argparse
import json
import random
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jdet
from jdet.testing.bits import host
from jdet.testing.programs import RandomProgram, random_program

SIZES = (1, 2, 7, 33)
# Distance of a value to the original's, relative to the largest: rounding, through five steps.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.02}


def outputs(fn, x, cotangent):
    """(y, gradient of x)."""
    y, pull = jax.vjp(fn, x)
    return y, pull(cotangent)[0]


def moved(program: RandomProgram, fn, sizes, seed: int):
    """(sizes at which the row's bits differ from the row alone, the row's values alone)."""
    step = jax.jit(lambda x, c: outputs(fn, x, c))
    rows = program.rows(seed, max(sizes))
    shape = jax.eval_shape(program, rows[:1]).shape[1:]
    rng = np.random.default_rng(seed + 1)
    cotangents = jnp.asarray(rng.standard_normal((max(sizes), *shape)).astype(np.float32))
    cotangents = cotangents.astype(jax.eval_shape(program, rows[:1]).dtype)
    first: list[np.ndarray] = []
    bad: list[int] = []
    for size in sizes:
        place = size // 2
        # Row 0 among others, at `place`.
        order = np.concatenate([np.arange(1, place + 1), [0], np.arange(place + 1, size)])
        made = [host(v)[place] for v in step(rows[order], cotangents[order])]
        if not first:
            first = made
        elif any(a.tobytes() != b.tobytes() for a, b in zip(first, made, strict=True)):
            bad.append(size)
    return bad, first


def distance(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.max(np.abs(a - b), initial=0) / (np.max(np.abs(a), initial=0) + 1))


def check(seed: int, control: bool = True) -> dict:
    """The record of one program."""
    program = random_program(random.Random(seed).choice, seed)
    bad, made = moved(program, program.under(jdet.batch_invariant), SIZES, seed)
    record = {"seed": seed, "program": str(program), "moved": bad}
    record["finite"] = bool(all(np.isfinite(np.asarray(v, np.float32)).all() for v in made))
    if control:
        plainly = program.under(lambda original: original)
        record["original_moved"], plain = moved(program, plainly, SIZES[::3], seed)
        far = [distance(a, b) for a, b in zip(plain, made, strict=True)]
        record["distance"] = max(far)
        # The gradient's error is not bounded by the output's: it is told, not judged.
        record["near"] = far[0] <= TOLERANCE[program.dtype] or not record["finite"]
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--programs", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="seed of the first program")
    parser.add_argument("--json", help="file for the result")
    options = parser.parse_args()
    start, records = time.time(), []
    for seed in range(options.first, options.first + options.programs):
        record = check(seed)
        records.append(record)
        if record["moved"] or not record["near"]:
            print(json.dumps(record), flush=True)
        jax.clear_caches()
    result = {
        "command": "python " + " ".join(sys.argv),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "seconds": round(time.time() - start),
        "sizes": SIZES,
        "programs": len(records),
        "moved": sum(bool(r["moved"]) for r in records),
        "far from the original": sum(not r["near"] for r in records),
        "not finite": sum(not r["finite"] for r in records),
        "originals that moved": sum(bool(r["original_moved"]) for r in records),
        "records": records,
    }
    print({k: v for k, v in result.items() if k != "records"})
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    return int(bool(result["moved"] or result["far from the original"]))


if __name__ == "__main__":
    sys.exit(main())
