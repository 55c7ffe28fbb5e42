"""Bit-for-bit checks of the GPU kernels on a real device, one section an op.

    python scripts/check_gpu.py --json check.json                # everything
    python scripts/check_gpu.py --only matmul --quick

Section matmul, on fixed inputs (normal, from a seed):

- schedules: every registered schedule, at every M, gives each row the bits it has in the
  batch of 4096 under the reference schedule (the first registered). Each call runs twice, and
  after a run on NaN inputs that leaves NaN in shared memory wherever the tile does not load.
- default: what users get (`schedule=None`), at every M, for the shapes of real models.
- oracle: distance to a float64 product; float32 results within 1e-5.
- control: plain XLA over the same M must show more than one bit pattern in row 0.

Section matmul_k_first does the first two with w [K, N], against the same reference, which has
w [N, K], its K continued by zeros to a multiple of 8. Section matmul_batch, in both layouts, gives
each entry of a batch other rows and the same w. Section matmul_several, in both layouts, cuts w in
several, and multiplies x by all of them in one launch. Section matmul_float32 is section matmul
with float32 operands, in both layouts.

Section gated_matmul does the same, w being gate and up. Its reference is made of two kernels:
the matmul under its reference schedule, and the gate's instructions on what that returns. And:

- formula: the gate alone, in float32, against float64: relative error at most 5 * 2**-23. Of
  GELU, whose argument is a cube with an error of its own, the error over |g|.

It reports every mismatch and exits with 1 if there is one. Work is spread over processes,
because the time goes to compiling one program per M. `sha256` in the JSON hashes the results on
the fixed inputs: equal hashes on another card or jax version mean that no bit moved.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "bench"))

TOP = 4096
EVERY_M = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
EVERY_M = (*EVERY_M, 1000, TOP)
SOME_M = (1, 9, 17, 65, 129, 257, 1000, TOP)
REAL_M = (1, 2, 7, 8, 9, 16, 31, 32, 64, 65, 128, 129, 256, 257, 512, 1000, TOP)
RAGGED = (1000, 1088)  # N no multiple of a tile; K / leaves ends in a tail for 2 and 8 leaves
TAIL = (1000, 1032)  # K tail of 8 without leaves
UNEVEN = (1000, 1039)  # K no multiple of 8, as only a w [K, N] may have it
NARROW = (300, 192)  # N a multiple of 4, where results of 16 bits want 8
GATED_TAIL = (2000, 1032)  # half of N no multiple of a tile either
GATED_M = (1, 7, 8, 9, 17, 63, 64, 65, 129, 257, 1000, TOP)
SMOLLM2 = ((576, 576), (960, 576), (1536, 576), (576, 1536), (3072, 576), (49152, 576))
GATED_REAL = {
    "silu": ((3072, 576), (6144, 1024), (24576, 4096)),
    "gelu_tanh": ((4096, 640), (20480, 2560)),
}
QWEN3_8B = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096))
_CACHE = {}


def _inputs(n, k, dtype):
    """x [TOP, k], w [n, k], bias [n] on the device; the same on every machine."""
    import jax
    import jax.numpy as jnp
    import ml_dtypes
    import numpy as np

    key = ("inputs", n, k, dtype)
    if key not in _CACHE:
        _CACHE.clear()
        rng = np.random.default_rng([n, k])
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        x = rng.standard_normal((TOP, k), np.float32).astype(kind)
        w = (rng.standard_normal((n, k), np.float32) * k**-0.5).astype(kind)
        b = rng.standard_normal(n, np.float32).astype(kind)
        _CACHE[key] = tuple(jax.device_put(jnp.asarray(v)) for v in (x, w, b))
    return _CACHE[key]


def _bits(y):
    import jax.numpy as jnp
    from jax import lax

    return lax.bitcast_convert_type(y, jnp.uint16 if y.dtype.itemsize == 2 else jnp.uint32)


def _op(job, schedule):
    """The job's op as a function of x, w and bias."""
    import jax
    import jax.numpy as jnp

    from jdet.pallas_kernels.gated_matmul import mosaic_gpu as gated
    from jdet.pallas_kernels.matmul import mosaic_gpu

    if job["op"] == "gated_matmul":
        fixed = {"activation": job["activation"], "schedule": schedule}
        return lambda x, w, b: gated.gated_matmul(x, w, **fixed)
    k_last, batch, cuts = job["k_last"], job["batch"], job["cuts"]
    fixed = {"leaves": job["leaves"], "out_dtype": job["out"], "schedule": schedule}

    def op(x, w, b):
        w = w if k_last else w.T
        if cuts:
            # Written each by itself, or XLA passes slices as they lie, at multiples of 64 bytes.
            ws = jax.lax.optimization_barrier(jnp.split(w, cuts, 0 if k_last else 1))
            return jnp.concatenate(mosaic_gpu.matmuls(x, ws, k_last=k_last, **fixed), 1)
        if batch == 1:
            return mosaic_gpu.matmul(x, w, bias=b, k_last=k_last, **fixed)
        xs, ws = x.reshape(batch, -1, x.shape[1]), jnp.broadcast_to(w, (batch, *w.shape))
        y = mosaic_gpu.matmul(xs, ws, bias=b, k_last=k_last, **fixed)
        return y.reshape(x.shape[0], -1)

    return op


def _exact_gate(activation, g):
    """What multiplies u, in float64."""
    import numpy as np

    if activation == "silu":
        return g / (1 + np.exp(-g))
    return g / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))


def _gate(activation, g, u):
    """The gate of gated_matmul by itself: its instructions in a kernel of their own."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jdet.pallas_kernels.gated_matmul.mosaic_gpu import GATES

    layout = plgpu.Layout.WG_STRIDED((4096,), 2)

    def kernel(g_g, u_g, y_g):
        at = jax.lax.axis_index("tile")
        g, u = (plgpu.load(v.at[at], layout=layout, optimized=False) for v in (g_g, u_g))
        y_g[at] = GATES[activation](g, u, layout, False)

    tiles = [jnp.pad(v.reshape(-1), (0, -v.size % 4096)).reshape(-1, 4096) for v in (g, u)]
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(tiles[0].shape, g.dtype),
        grid=(tiles[0].shape[0],),
        grid_names=("tile",),
    )
    return call(*tiles).reshape(-1)[: g.size].reshape(g.shape)


def _reference(job):
    """The batch of TOP rows under the reference schedule, and its hash."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jdet.pallas_kernels.matmul import mosaic_gpu

    n, k, dtype = job["n"], job["k"], job["dtype"]
    x, w, b = _inputs(n, k, dtype)
    names = ("op", "n", "k", "dtype", "leaves", "out", "bias", "activation")
    key = ("reference", *(job[name] for name in names))
    if key not in _CACHE:
        first = mosaic_gpu.schedules(TOP, n, k, dtype, job["leaves"])[0]
        plain = {**job, "op": "matmul", "k_last": True, "batch": 1, "cuts": ()}
        x, w = (jnp.pad(a, ((0, 0), (0, -k % 8))) for a in (x, w))
        y = _op(plain, first)(x, w, b if job["bias"] else None)
        if job["op"] == "gated_matmul":
            y = jax.jit(lambda y: _gate(job["activation"], *jnp.split(y, 2, axis=1)))(y)
        digest = hashlib.sha256(np.asarray(jax.jit(_bits)(y)).tobytes()).hexdigest()
        _CACHE[key] = (y, digest)
    return _CACHE[key]


def run_job(job):
    """{..., rows, wrong: [[M, count, what]], seconds}."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    start = time.perf_counter()
    wrong, done = [], 0
    result = {**job, "schedule": str(job.get("schedule")), "wrong": wrong}
    try:
        x, w, b = _inputs(job["n"], job["k"], job["dtype"])
        ref, result["sha256"] = _reference(job)
        op = _op(job, job.get("schedule"))
        host, nan = np.asarray(x), jnp.full_like(w, jnp.nan)
        nans = np.full_like(host, np.nan)
        for m in job["ms"]:

            @jax.jit
            def rows_that_differ(x, w, b, ref, m=m):
                return jnp.sum(jnp.any(_bits(op(x, w, b)) != _bits(ref[:m]), axis=1))

            xs, bs = jax.device_put(host[:m]), b if job["bias"] else None
            jax.block_until_ready(rows_that_differ(jax.device_put(nans[:m]), nan, bs, ref))
            for run in ("first run", "second run"):
                differ = int(rows_that_differ(xs, w, bs, ref))
                if differ:
                    wrong.append([m, differ, f"rows differ, {run}"])
            done += 1
    except Exception as e:  # reported: one failure must not hide the others
        wrong.append([0, 0, f"{type(e).__name__}: {str(e)[:300]}"])
    return {**result, "calls": done, "seconds": round(time.perf_counter() - start, 1)}


def run_oracle(job):
    """Relative distance of a few rows to the float64 product."""
    import numpy as np

    x, w, b = _inputs(job["n"], job["k"], job["dtype"])
    ref, digest = _reference(job)
    x, w, b, y = (np.asarray(v, np.float64) for v in (x[:64], w, b, ref[:64]))
    want = x @ w.T + (b if job["bias"] else 0)
    if job["op"] == "gated_matmul":
        gate, up = np.split(want, 2, axis=1)
        want = _exact_gate(job["activation"], gate) * up
    error = float(np.linalg.norm(y - want) / np.linalg.norm(want))
    bound = {"float32": 1e-5, "float16": 1e-3}.get(job["out"], 5e-3)
    wrong = [] if error < bound else [[64, 64, f"relative error {error:.2e} over {bound:.0e}"]]
    return {**job, "error": error, "calls": 1, "sha256": digest, "wrong": wrong, "seconds": 0.0}


def run_formula(job):
    """The gate's largest error in 2**-23 over bfloat16 gates, and random ones."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    start, activation = time.perf_counter(), job["activation"]
    patterns = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    gates = np.concatenate([patterns, np.random.default_rng(0).uniform(-87, 87, 1 << 22)])
    gates = gates[(abs(gates) > 1e-37) & (gates > -87) & (gates < 1e38)].astype(np.float32)
    gate = jax.jit(functools.partial(_gate, activation))
    y = np.asarray(gate(jnp.asarray(gates), jnp.ones(gates.shape, jnp.float32)))
    wide = gates.astype(np.float64)
    with np.errstate(over="ignore"):  # of the cube: its exponential is 0 or infinity
        exact = _exact_gate(activation, wide)
    error = abs(y - exact) / abs(exact if activation == "silu" else wide) * 2**23
    worst = int(error.argmax())
    wrong = [] if error[worst] <= 5 else [[0, 0, f"{error[worst]:.2f} * 2**-23 at {gates[worst]}"]]
    return {
        **job,
        "negative": float(error[gates < 0].max()),
        "positive": float(error[gates > 0].max()),
        "at": float(gates[worst]),
        "calls": 1,
        "wrong": wrong,
        "seconds": round(time.perf_counter() - start, 1),
    }


def run_control(job):
    """The number of bit patterns of row 0 under plain XLA."""
    import jax
    import numpy as np

    from jdet.pallas_kernels import implementation_of

    start = time.perf_counter()
    x, w, _ = _inputs(job["n"], job["k"], job["dtype"])
    f = implementation_of(job["op"], "xla")
    if job["op"] == "gated_matmul":
        f = functools.partial(f, activation=job["activation"])
    f, groups = jax.jit(f), {}
    for m in job["ms"]:
        y = f(x[:m], w)
        groups.setdefault(np.asarray(y[0]).tobytes(), []).append(m)
    wrong = [] if len(groups) > 1 else [[0, 0, "plain XLA showed one bit pattern only"]]
    return {
        **job,
        "patterns": sorted(groups.values()),
        "calls": len(job["ms"]),
        "wrong": wrong,
        "seconds": round(time.perf_counter() - start, 1),
    }


def dispatch(job):
    kinds = {"oracle": run_oracle, "control": run_control, "formula": run_formula}
    return kinds.get(job["check"], run_job)(job)


def describe(_):
    import timing  # pyright: ignore[reportMissingImports]

    return timing.environment()


def _job(op, check, nk, ms, leaves=1, dtype="bfloat16", out="bfloat16", bias=False, **rest):
    return {
        "op": op,
        "check": check,
        "n": nk[0],
        "k": nk[1],
        "ms": tuple(ms),
        "leaves": leaves,
        "dtype": dtype,
        "out": out,
        "bias": bias,
        "activation": "silu",  # of gated_matmul
        "k_last": True,
        "batch": 1,
        "cuts": (),  # of w, between the products of one launch
        **rest,
    }


def _longest_first(jobs):
    """So that no process is left with a long one at the end."""
    return sorted(jobs, key=lambda j: -(j["n"] * j["k"] + 10**7 * len(j["ms"])))


def matmul_jobs(quick):
    """Every case of the section."""
    from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import schedules

    job, jobs = functools.partial(_job, "matmul"), []
    for leaves, nk in ((1, TAIL), (2, RAGGED), (8, RAGGED)):
        for out in ("float32", "bfloat16"):
            jobs.append(job("oracle", nk, (), leaves, out=out))
        every = EVERY_M if leaves == 1 and not quick else SOME_M
        for s in schedules(TOP, *nk, "bfloat16", leaves):
            jobs.append(job("schedules", nk, every, leaves, out="float32", schedule=s))
    if not quick:
        for s in schedules(TOP, *TAIL, "bfloat16"):
            jobs.append(job("schedules", TAIL, (9, 257), bias=True, schedule=s))
            jobs.append(job("schedules", (4096, 4096), (17, 1000), out="float32", schedule=s))
        jobs.append(job("oracle", TAIL, (), dtype="float16", out="float16", bias=True))
        for nk in (*SMOLLM2, *QWEN3_8B):
            jobs.append(job("default", nk, REAL_M))
        jobs.append(job("default", TAIL, EVERY_M, bias=True))
        jobs.append(job("default", TAIL, SOME_M, dtype="float16", out="float16", bias=True))
        jobs.append(job("default", (997, 1032), SOME_M))
        for leaves in (2, 8):
            for nk in ((576, 576), (960, 960), (576, 1536), (4096, 4096), (4096, 12288)):
                jobs.append(job("default", nk, SOME_M, leaves))
    jobs.append(job("control", (4096, 4096), EVERY_M if not quick else REAL_M))
    return _longest_first(jobs)


def k_first_jobs(quick):
    """Weights [K, N]: every schedule that walks them, and what users get."""
    from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import schedules

    job, jobs = functools.partial(_job, "matmul", k_last=False), []
    for leaves, nk in ((1, TAIL), (2, RAGGED), (8, RAGGED)):
        every = EVERY_M if leaves == 1 and not quick else SOME_M
        for s in schedules(TOP, *nk, "bfloat16", leaves, k_last=False):
            jobs.append(job("schedules", nk, every, leaves, out="float32", schedule=s))
    for s in schedules(TOP, *NARROW, "bfloat16", k_last=False):
        jobs.append(job("schedules", NARROW, (9, 257), out="float32", schedule=s))
    for s in schedules(TOP, *UNEVEN, "bfloat16", k_last=False)[:: 4 if quick else 1]:
        jobs.append(job("schedules", UNEVEN, (9, 257), out="float32", schedule=s))
    for dtype in ("bfloat16", "float32"):
        jobs.append(job("default", UNEVEN, SOME_M, dtype=dtype, out="float32"))
    if not quick:
        for s in schedules(TOP, *TAIL, "bfloat16", k_last=False):
            jobs.append(job("schedules", TAIL, (9, 257), bias=True, schedule=s))
            jobs.append(job("schedules", (4096, 4096), (17, 1000), out="float32", schedule=s))
        jobs.append(job("default", TAIL, SOME_M, dtype="float16", out="float16", bias=True))
        jobs.append(job("default", (997, 1032), SOME_M))
    for nk in QWEN3_8B:
        jobs.append(job("default", nk, REAL_M if quick else EVERY_M))
    return _longest_first(jobs)


def batch_jobs(quick):
    """Three entries a batch: some schedules, and what users get."""
    from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import schedules

    jobs = []
    for k_last in (True, False):
        job = functools.partial(_job, "matmul", k_last=k_last, batch=3)
        ms = (3, 24, 51, 195, 771, 3000)
        for leaves, nk in ((1, TAIL), (2, RAGGED)):
            jobs.append(job("default", nk, ms, leaves))
            if not quick:
                for s in schedules(TOP, *nk, "bfloat16", leaves, k_last=k_last):
                    jobs.append(job("schedules", nk, (51, 771), leaves, schedule=s))
        # Attention's; the last a cache of 1039 tokens.
        for nk in ((2048, 128), (128, 2048), (64, 1024), (128, 1039))[: 3 if k_last else 4]:
            jobs.append(job("default", nk, ms))
    return _longest_first(jobs)


def several_jobs(quick):
    """Several products of one x: every schedule, and what users get."""
    from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import schedules

    jobs = []
    for k_last in (True, False):
        job = functools.partial(_job, "matmul", k_last=k_last)
        for leaves, nk in ((1, TAIL), (2, RAGGED), (8, RAGGED)):
            ms = SOME_M if leaves == 1 and not quick else (9, 65, 257)
            for s in schedules(TOP, *nk, "bfloat16", leaves, k_last=k_last):
                fixed = {"out": "float32", "schedule": s}
                jobs.append(job("schedules", nk, ms, leaves, cuts=(404, 412), **fixed))
        jobs.append(job("default", (6144, 4096), REAL_M, cuts=(4096, 5120)))
        jobs.append(job("default", (24576, 4096), REAL_M, cuts=(12288,)))
        for dtype, nk in (("float16", TAIL), ("float32", TAIL), ("float32", NARROW)):
            jobs.append(job("default", nk, SOME_M, dtype=dtype, out=dtype, cuts=(100, 196)))
    return _longest_first(jobs)


def float32_jobs(quick):
    """Float32 operands."""
    from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import schedules

    job = functools.partial(_job, "matmul", dtype="float32", out="float32")
    jobs = [job("oracle", nk, (), leaves) for leaves, nk in ((1, TAIL), (8, RAGGED))]
    for k_last in (True, False):
        for leaves, nk in ((1, TAIL), (2, RAGGED)):
            jobs.append(job("default", nk, SOME_M, leaves, k_last=k_last))
        jobs.append(job("default", (4096, 4096), SOME_M, k_last=k_last))
        jobs.append(job("default", (2048, 128), SOME_M[1:], k_last=k_last))
        jobs.append(job("default", NARROW, SOME_M, k_last=k_last))
        every = schedules(TOP, *TAIL, "float32", k_last=k_last)
        for s in every[:: 4 if quick else 1]:
            jobs.append(job("schedules", TAIL, (9, 257), k_last=k_last, schedule=s))
    jobs.append(job("control", (4096, 4096), REAL_M))
    return _longest_first(jobs)


def gated_matmul_jobs(quick, activation="silu"):
    """Every case of the section; N counts the rows of w, gate and up."""
    from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import schedules

    job = functools.partial(_job, "gated_matmul", activation=activation)
    jobs = [job("formula", (0, 0), ()), job("oracle", GATED_TAIL, ())]
    for s in schedules(TOP, *GATED_TAIL, "bfloat16", out_size=2, gated=True):
        jobs.append(job("schedules", GATED_TAIL, SOME_M if quick else GATED_M, schedule=s))
        if not quick:
            jobs.append(job("schedules", (8192, 4096), (17, 1000), schedule=s))
    if not quick:
        jobs.append(job("oracle", GATED_TAIL, (), dtype="float16", out="float16"))
        jobs.append(job("default", GATED_TAIL, SOME_M, dtype="float16", out="float16"))
        jobs.append(job("default", (1994, 1032), SOME_M))
        for nk in GATED_REAL[activation]:
            jobs.append(job("default", nk, REAL_M))
    jobs.append(job("control", (8192, 4096), SOME_M))
    return _longest_first(jobs)


SECTIONS = {
    "matmul": matmul_jobs,
    "matmul_k_first": k_first_jobs,
    "matmul_batch": batch_jobs,
    "matmul_several": several_jobs,
    "matmul_float32": float32_jobs,
    "gated_matmul": gated_matmul_jobs,
    "gated_matmul_gelu": functools.partial(gated_matmul_jobs, activation="gelu_tanh"),
}


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer M and shapes")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument(
        "--limit", type=float, default=480, help="seconds until it reports what it has"
    )
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jobs = [j for name in args.only for j in SECTIONS[name](args.quick)]
    end = time.monotonic() + args.limit
    pool = multiprocessing.get_context("spawn").Pool(args.jobs)
    env = pool.apply(describe, (None,))
    results, rows = pool.imap_unordered(dispatch, jobs), []
    for _ in jobs:
        try:
            rows.append(results.next(timeout=max(1.0, end - time.monotonic())))
        except multiprocessing.TimeoutError:
            break
    pool.terminate()

    hashes, failures, counts = {}, [], {}
    for r in rows:
        shape = f"N={r['n']} K={r['k']} leaves={r['leaves']} {r['dtype']}->{r['out']}"
        op = r["op"] if r["activation"] == "silu" else f"{r['op']} {r['activation']}"
        op += ("" if r["k_last"] else " k_first") + (" batch" if r["batch"] > 1 else "")
        op += " several" if r["cuts"] else ""
        label = f"{op} {r['check']} {shape}"
        count = counts.setdefault((op, r["check"]), [0, 0, 0])
        count[0] += 1
        count[1] += r["calls"]
        count[2] += bool(r["wrong"])
        failures += [[label, r.get("schedule", ""), *w] for w in r["wrong"]]
        if "sha256" in r:
            name = f"{op} {shape} bias={r['bias']}"
            for word in (" k_first", " batch", " several"):
                name = name.replace(word, "")
            if hashes.setdefault(name, r["sha256"]) != r["sha256"]:
                failures.append([name, "", TOP, TOP, "two processes hash differently"])
        if r["check"] == "oracle":
            print(f"{label}: relative error {r['error']:.2e}")
        if r["check"] == "formula":
            worst = {name: round(r[name], 2) for name in ("negative", "positive", "at")}
            print(f"{op} formula: largest relative error in 2**-23 {worst}")
        if r["check"] == "control":
            print(f"{label}: plain XLA {len(r['patterns'])} patterns {r['patterns']}")
    if len(rows) < len(jobs):
        failures.append(
            ["all", "", 0, 0, f"{len(jobs) - len(rows)} of {len(jobs)} jobs not finished"]
        )
    print(f"{'check':32} {'cases':>6} {'shapes':>7} {'wrong':>6}")
    for (op, check), (cases, calls, bad) in sorted(counts.items()):
        print(f"{op + ' ' + check:32} {cases:6} {calls:7} {bad:6}")
    for f in failures[:60]:
        print("FAIL", *f)
    print(f"{len(failures)} failures, {env['device']}, jax {env['versions']['jax']}")
    if args.json:
        slim = [{k: v for k, v in r.items() if k not in ("sha256",)} for r in rows]
        out = {
            **env,
            "failures": failures,
            "sha256": dict(sorted(hashes.items())),
            "counts": {
                " ".join(k): dict(zip(("cases", "shapes", "wrong"), v, strict=True))
                for k, v in sorted(counts.items())
            },
            "cases": sorted(slim, key=lambda r: json.dumps(r, default=str)),
        }
        args.json.write_text(json.dumps(out, indent=1, default=str) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
