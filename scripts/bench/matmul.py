"""Matmul on a GPU: ours, plain XLA (autotuned), and the floor, for Qwen3-8B's shapes.

    python scripts/bench/matmul.py --json results.json             # the table
    python scripts/bench/matmul.py --sweep --json sweep.json       # every plausible schedule
    python scripts/bench/matmul.py --only gated --chain            # some of it
    python scripts/bench/matmul.py --k-first --chain               # weights [K, N], x @ w

`gated` is gate_up with the SiLU gate: in the epilogue of ours; XLA may fuse as it likes.

Device time by CUPTI, weights rotated over at least 250 MB, medians. Programs are compiled in
`--jobs` processes side by side, XLA's by two at a time, since it measures to tune itself; one
process at a time is timed, while none tunes.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

OPS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (24576, 4096),
    "gated": (24576, 4096),
    "down": (4096, 12288),
    "lm_head": (151936, 4096),
}
MS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
ROUNDS = 3
TURNS = 2  # autotunings at a time
TURN: Any = None
GATE: Any = None  # held while taking every turn, so that two such do not wait for each other
_CACHE = {}


def _start(turn, gate):
    global TURN, GATE
    TURN, GATE = turn, gate


@contextlib.contextmanager
def alone():
    """The card for this process: nobody times and nobody autotunes meanwhile."""
    with contextlib.ExitStack() as held:
        with GATE:
            for _ in range(TURNS):
                held.enter_context(TURN)
        yield


def _inputs(m, n, k, copies, k_last=True):
    """A function that draws the inputs: compiled here, run when the card is free."""
    import jax
    import jax.numpy as jnp

    if "draw" not in _CACHE:

        @functools.partial(jax.jit, static_argnums=(1, 2, 3))
        def draw(seed, rows, cols, scale):
            bits = jax.random.normal(jax.random.key(seed), (rows, cols), jnp.bfloat16)
            return bits * jnp.bfloat16(scale)

        _CACHE["draw"] = draw
    draw = _CACHE["draw"]
    key, of_w = (m, n, k, k_last), (n, k) if k_last else (k, n)
    if key not in _CACHE:
        _CACHE[key] = [draw.lower(0, *a).compile() for a in ((m, k, 1.0), (*of_w, 0.02))]
    draw_x, draw_w = _CACHE[key]
    return lambda: ([draw_x(i) for i in range(copies)], [draw_w(i) for i in range(copies)])


def run_job(job):
    """Rows {op, m, schedule, us} or {..., error}: compiled side by side, timed one by one."""
    import jax
    import timing
    from jax import lax

    from jdet.pallas_kernels.gated_matmul.mosaic_gpu import gated_matmul
    from jdet.pallas_kernels.matmul.mosaic_gpu import matmul
    from jdet.pallas_kernels.silu_mul.xla import silu_mul

    op, m, names, k_last = job
    n, k = OPS[op]
    copies = timing.copies_for(2 * n * k)

    def program(which):
        def ours(xs, ws):
            if op == "gated":
                f = functools.partial(gated_matmul, schedule=which)
            else:
                f = functools.partial(matmul, schedule=which, k_last=k_last)
            return [f(x, w) for x, w in zip(xs, ws, strict=True)]

        def xla(xs, ws):
            dims = (((1,), (1 if k_last else 0,)), ((), ()))
            ys = [lax.dot_general(x, w, dims) for x, w in zip(xs, ws, strict=True)]
            return [silu_mul(y) for y in ys] if op == "gated" else ys

        extents = (m, k), (n, k) if k_last else (k, n)
        shapes = [[jax.ShapeDtypeStruct(s, "bfloat16")] * copies for s in extents]
        lowered = jax.jit(xla if which == "xla" else ours).lower(*shapes)
        if which != "xla":
            return lowered.compile()
        with TURN:  # autotuning measures, though most of its time goes to compiling
            return lowered.compile()

    rows, programs = [], []
    draw = _inputs(m, n, k, copies, k_last)
    for which in names:
        row = {"op": op, "m": m, "schedule": str(which)}
        rows.append(row)
        try:
            start = time.perf_counter()
            programs.append((row, program(which)))
            row["compile_s"] = round(time.perf_counter() - start, 2)
        except Exception as e:  # in the row: one bad schedule must not end the sweep
            row["error"] = f"{type(e).__name__}: {str(e)[:300]}"
    with alone():
        args = draw()
        jax.block_until_ready(args)
        # In turns, each round the other way round, with rests as long as the work was heavy:
        # a card at its power limit is slower for whoever comes second.
        samples = {id(row): [] for row, _ in programs}
        for turn in range(ROUNDS):
            for row, f in programs[:: 1 if turn % 2 == 0 else -1]:
                try:
                    samples[id(row)].append(timing.device_us(f, *args))
                    time.sleep(min(0.4, 50e-6 * samples[id(row)][-1]))
                except Exception as e:
                    row["error"] = f"{type(e).__name__}: {str(e)[:300]}"
        for row, _ in programs:
            if "error" not in row:
                row["us"] = round(statistics.median(samples[id(row)]) / copies, 3)
        del args
    return rows


def run_chain(m):
    """Wall-clock of 48 dependent 4096x4096 products in one jit: what launches cost."""
    import jax
    import timing
    from jax import lax

    from jdet.pallas_kernels.matmul import mosaic_gpu

    def chain(one):
        def f(x, ws):
            for w in ws:
                x = one(x, w)
            return x

        return jax.jit(f)

    with alone():
        draw = _inputs(m, 4096, 4096, 48)
        xs, ws = draw()
        forms = {
            "ours": chain(lambda x, w: mosaic_gpu.matmul(x, w)),
            "xla": chain(lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ())))),
        }
        times = {}
        for name, f in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(f(xs[0], ws))
            compile_s = time.perf_counter() - start
            times[name] = {
                "us": round(timing.wall_us(f, xs[0], ws), 1),
                "compile_s": round(compile_s, 2),
            }
    return {"m": m, "products": 48, "shape": [4096, 4096], "wall": times}


def ceilings(_):
    import timing

    with alone():
        return timing.copy_rate(), timing.matrix_rate(), timing.environment()


def plausible(s, m):
    """Whether `--sweep` should spend time on schedule `s` at M = m."""
    if s.kind == "swapped":
        return m <= s.bm <= 2 * max(m, 8) or (m > 128 and s.bm >= 128)
    if m <= 64:
        return s.bm == 64
    if m <= 128:
        return s.bm == 128 and s.cm == 1 and s.bn <= 192
    if m <= 256:
        return s.bm >= 128 and s.bn >= 64 and s.bm * s.cm <= 256
    return s.bm * s.bn >= 128 * 192 or s.bn == 128 == s.bm and s.bk == 64


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep", action="store_true", help="time every plausible schedule")
    parser.add_argument("--k-first", action="store_true", help="weights [K, N]; no gate")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--only", nargs="*", choices=OPS, default=list(OPS), dest="ops")
    parser.add_argument("--ms", nargs="*", type=int, default=list(MS))
    parser.add_argument("--chain", nargs="*", type=int, default=[8, 64], help="M of the chains")
    parser.add_argument(
        "--limit", type=float, default=480, help="seconds until it reports what it has"
    )
    args = parser.parse_args()
    # Many processes share the card: none may keep what it does not use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    from jdet.pallas_kernels.matmul import mosaic_gpu_schedules as sched

    names, chosen, k_last = {}, {}, not args.k_first
    if args.k_first:
        args.ops = [op for op in args.ops if op != "gated"]
    for op in args.ops:
        n, k = OPS[op]
        for m in args.ms:
            gated = op == "gated"
            best = sched.default_schedule(m, n, k, "bfloat16", gated=gated, k_last=k_last)
            chosen[op, m] = str(best)
            names[op, m] = [best]
            if args.sweep:
                every = sched.schedules(m, n, k, "bfloat16", 1, 2, gated, k_last)
                names[op, m] += [s for s in every if plausible(s, m) and s != best]
    jobs = [(op, m, ("xla", these[0]), k_last) for (op, m), these in names.items()]
    for (op, m), these in names.items():
        jobs += [(op, m, tuple(these[i : i + 8]), k_last) for i in range(1, len(these), 8)]
    context = multiprocessing.get_context("spawn")
    guards = (context.Semaphore(TURNS), context.Lock())
    end = time.monotonic() + args.limit
    rows, missing, chains = [], 0, []
    pool = context.Pool(args.jobs, _start, guards)
    copy, matrix, env = pool.apply(ceilings, (None,))
    results = pool.imap_unordered(run_job, jobs)
    for i in range(len(jobs)):
        try:
            rows += results.next(timeout=max(1.0, min(120.0, end - time.monotonic())))
        except multiprocessing.TimeoutError:
            missing = len(jobs) - i
            break
    pool.terminate()
    pool.join()
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "default"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    pool = context.Pool(1, _start, guards)
    try:
        chains = pool.map_async(run_chain, args.chain).get(timeout=60)
    except multiprocessing.TimeoutError:
        missing += 1
    pool.terminate()

    table, ratios = [], []
    for op in args.ops:
        for m in args.ms:
            n, k = OPS[op]
            got = [r for r in rows if (r["op"], r["m"]) == (op, m) and "us" in r]
            xla = [r["us"] for r in got if r["schedule"] == "xla"]
            compiled = {r["schedule"]: r["compile_s"] for r in got}
            timed = sorted((r["us"], r["schedule"]) for r in got if r["schedule"] != "xla")
            ours = [us for us, name in timed if name == chosen[op, m]]
            if not (xla and ours):
                print(f"{op:8} {m:5} incomplete", timed[:6])
                continue
            nbytes = 2 * (n * k + m * k + m * (n // 2 if op == "gated" else n))
            floor = max(nbytes / copy, 2 * m * n * k / matrix) * 1e6
            row = {
                "op": op,
                "shape": [m, n, k],
                "schedule": chosen[op, m],
                "ours_us": ours[0],
                "xla_us": xla[0],
                "floor_us": round(floor, 3),
                "ratio": round(ours[0] / xla[0], 4),
                "ours_compile_s": compiled[chosen[op, m]],
                "xla_compile_s": compiled["xla"],
            }
            if args.sweep:
                row["sweep"] = timed
            table.append(row)
            ratios.append(row["ratio"])
            extra = "  ".join(f"{name}:{us:.1f}" for us, name in timed[:4]) if args.sweep else ""
            print(
                f"{op:8} {m:5} {ours[0]:9.2f} {xla[0]:9.2f} {floor:9.2f} {row['ratio']:7.3f}"
                f" {chosen[op, m]}  {extra}"
            )
    for c in chains:
        shown = "  ".join(f"{name}: {v['us']} us" for name, v in c["wall"].items())
        print(f"chain of 48, M={c['m']}, wall clock: {shown}")
    errors = [r for r in rows if "error" in r]
    for r in errors:
        print("ERROR", r["op"], r["m"], r["schedule"], r["error"])
    geomean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    print(f"geomean {geomean:.4f}  worst {max(ratios, default=math.nan):.4f}  not run {missing}")
    print(f"copy {copy / 1e12:.3f} TB/s  matrix {matrix / 1e12:.1f} TFLOP/s  {env['device']}")
    if args.json:
        out = {
            **env,
            "copy_bytes_per_s": copy,
            "matrix_flops_per_s": matrix,
            "geomean": geomean,
            "method": "CUPTI device time, median of 3 rounds of medians of 7, ours and XLA in"
            " turns, weights rotated over >= 250 MB",
            "rows": table,
            "chains": chains,
            "errors": errors,
            "not_run": missing,
        }
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
