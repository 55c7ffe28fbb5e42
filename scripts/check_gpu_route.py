"""Bit-for-bit checks and timings of the Mosaic GPU routing, on a Hopper card.

    python scripts/check_gpu_route.py --json h100-check-route.json
    python scripts/check_gpu_route.py --skip-times

Checks, for every number of tokens around the limits of the schedules and every schedule, bits
against `portable` compiled by XLA on the same card: experts, weights, places, tokens and sizes, and
the plan of tiles against `grouped_matmul.mosaic_gpu.plan`. Logits are normal, rounded so that many
are equal, all alike, infinite here and there, NaN here and there, and such that all tokens choose
the same experts; a third of the tokens is not routed and holds NaN. Normal logits are drawn from
one pool of tokens, shuffled: each must have the same experts and weights in every batch.

Then device times (CUPTI, median) of the kernels by schedule, and of what XLA makes of `portable`
and the plan.

It reports every mismatch and exits with 1 if there is one. Lowering takes seconds a shape: the
checks are divided among processes.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

SIZES = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
# (experts, chosen, normalised), tokens.
OTHER = (1, 3, 4, 8, 9, 16, 17, 33)  # numbers of tokens for the schedule that is not the default
POOL = 512
SHAPES = [((128, 8, True), m) for m in SIZES]
SHAPES += [((128, 8, False), m) for m in (5, 33)]
SHAPES += [((128, 1, True), 9), ((128, 32, True), 18), ((256, 4, True), 17), ((512, 16, True), 3)]
TIMED = (1, 8, 16, 32, 64, 256)
KINDS = ("normal", "rounded", "alike", "infinite", "nan", "one choice", "not routed")


def tokens_of(m: int) -> Any:
    """Which tokens of the pool a batch of normal logits has."""
    import numpy as np

    return (np.arange(m) * 7 + 3 * m) % POOL


def logits_of(kind: str, m: int, experts: int) -> tuple[Any, Any]:
    """(logits, routed) of m tokens."""
    import numpy as np

    rng = np.random.default_rng([KINDS.index(kind), experts])
    x = rng.standard_normal((POOL, experts)).astype(np.float32)[tokens_of(m)] * 3
    spots = rng.random((POOL, experts))[:m]
    routed = np.ones(m, bool)
    if kind == "rounded":
        x = np.round(x)
    elif kind == "alike":
        x[:] = 1.5
        x[::2, 7:] -= 200
    elif kind == "infinite":
        x[spots < 0.02] = -np.inf
        x[spots > 0.999] = np.inf
    elif kind == "nan":
        x[spots > 0.998] = np.nan
    elif kind == "one choice":
        x = x * 0.01 + np.arange(experts, dtype=np.float32)
    elif kind == "not routed":
        routed = spots[:, 0] > 1 / 3
        x[~routed] = np.nan
    return x, routed


def check(shapes: list[tuple[tuple[int, int, bool], int]]) -> tuple[int, list[Any], list[Any]]:
    """(cases, mismatches, what normal tokens got) of some of SHAPES."""
    import jax
    import numpy as np

    import jdet
    from jdet.pallas_kernels.grouped_matmul.mosaic_gpu import plan
    from jdet.pallas_kernels.grouped_matmul.mosaic_gpu_schedules import tile_height
    from jdet.pallas_kernels.route import mosaic_gpu, portable

    cases, failures, rows = 0, [], []
    for (experts, k, normalise), m in shapes:
        options = {"k": k, "normalise": normalise}
        height = tile_height(m * k, experts)

        def reference(x, routed, options=options, m=m, k=k, height=height):
            wanted = portable.route(x, routed, **options)
            return wanted, plan(wanted.sizes, m * k, height)

        runs = {
            str(s): jdet.jit(
                lambda x, routed, s=s, options=options: mosaic_gpu.route(
                    x, routed, schedule=s, **options
                ),
                implementation="mosaic_gpu",
            )
            for s in mosaic_gpu.SCHEDULES
            if m in OTHER or s == mosaic_gpu.default_schedule(m)
        }
        reference = jdet.jit(reference, implementation="mosaic_gpu")
        for kind in KINDS:
            given = logits_of(kind, m, experts)
            wanted, tiles = jax.tree.map(np.asarray, reference(*given))
            for name, run in runs.items():
                cases += 1
                got = jax.tree.map(np.asarray, run(*given))
                wrong = [
                    field
                    for field, a, b in zip(got._fields, got, wanted, strict=True)
                    if b is not None and a.tobytes() != b.tobytes()
                ]
                used = 1 + tiles[0, 1]
                if got.tiles is not None and (got.tiles[:used] != tiles[:used]).any():
                    wrong.append("tiles")
                if wrong:
                    failures.append([experts, k, normalise, m, kind, name, wrong])
                    print("FAIL", failures[-1], flush=True)
                if kind == "normal" and (experts, k, normalise) == SHAPES[0][0]:
                    rows.append((m, name, got.experts, got.weights))
    return cases, failures, rows


def check_batches(rows: list[Any]) -> list[Any]:
    """Batches in which a token of the pool got anything else than in the largest."""
    rows = sorted(rows, key=lambda row: -row[0])
    known = {}
    for token, *of_token in zip(tokens_of(rows[0][0]), *rows[0][2:], strict=True):
        known[token] = [a.tobytes() for a in of_token]
    failures = []
    for m, name, *results in rows:
        for token, *of_token in zip(tokens_of(m), *results, strict=True):
            mine = [a.tobytes() for a in of_token]
            if known.setdefault(token, mine) != mine:
                failures.append(["batches", m, name, int(token)])
    return failures


def times() -> list[dict[str, Any]]:
    """Microseconds of each schedule, and of XLA's kernels, by tokens."""
    import jax
    import timing  # pyright: ignore[reportMissingImports]

    import jdet
    from jdet.pallas_kernels.grouped_matmul.mosaic_gpu import plan
    from jdet.pallas_kernels.grouped_matmul.mosaic_gpu_schedules import tile_height
    from jdet.pallas_kernels.route import mosaic_gpu, portable

    jobs = {}
    for m in TIMED:
        given = jax.tree.map(jax.device_put, logits_of("normal", m, 128))

        def xla(x, routed, m=m):
            r = portable.route(x, routed, k=8, normalise=True)
            return r, plan(r.sizes, m * 8, tile_height(m * 8, 128))

        jobs[m, "xla"] = xla, given
        for s in mosaic_gpu.SCHEDULES:
            if m <= 16 or s.apart:
                jobs[m, "apart" if s.apart else "together"] = (
                    functools.partial(mosaic_gpu.route, k=8, normalise=True, schedule=s),
                    given,
                )

    def build(job):
        f, given = job
        return jdet.jit(f, implementation="mosaic_gpu").lower(*given).compile()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = dict(zip(jobs, pool.map(build, jobs.values()), strict=True))
    rows: dict[int, dict[str, Any]] = {m: {"tokens": m} for m in TIMED}
    for (m, side), program in programs.items():
        us = timing.device_us(program, *jobs[m, side][1])
        rows[m][f"{side}_us"] = round(us, 2)
    for row in rows.values():
        print(row, flush=True)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-times", action="store_true")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    args = parser.parse_args()
    start = time.perf_counter()
    # Each process holds what it needs of the card's memory and no more.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with concurrent.futures.ProcessPoolExecutor(
        args.jobs, multiprocessing.get_context("spawn")
    ) as pool:
        parts = [pool.submit(check, SHAPES[i :: args.jobs]) for i in range(args.jobs)]
        results = [p.result() for p in parts]
    cases, failures = sum(r[0] for r in results), [f for r in results for f in r[1]]
    rows = [row for r in results for row in r[2]]
    failures += check_batches(rows)
    print(*failures[-20:], sep="\n")
    print(f"{cases} cases: {time.perf_counter() - start:.0f} s", flush=True)
    measured = [] if args.skip_times else times()
    import timing  # pyright: ignore[reportMissingImports]

    env = timing.environment()
    print(f"{len(failures)} failures, {env['device']}, {time.perf_counter() - start:.0f} s")
    if args.json:
        out = {**env, "cases": cases, "batches": len(rows), "failures": failures, "times": measured}
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
