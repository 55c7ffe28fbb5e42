"""Bit-for-bit checks and timings of the Mosaic GPU attention on a real device.

    python scripts/check_gpu_attention.py --json h100-attention.json
    python scripts/check_gpu_attention.py --only options --json h100-attention-options.json

Checks, on fixed normal inputs, NaN in every slot of the cache that no query of its row sees and in
every padding query:

- oracle: distance to a float64 attention in numpy; padding gives zeros; two runs agree.
- schedules: walked by 1 and 2 consumers, spread over few and many blocks: one set of bits.
- decode: the query at position t alone, in a batch with other contexts, equals row t of the
  prefill of 8192 tokens, at every split boundary and its neighbours and on a stride between.
- batches: batch sizes 1 to 128, and neighbours of 1 to 32768 keys.
- chunks: a prompt of 1000 tokens in chunks of several sizes.
- paged: pages of 16, 64 and 256 slots, shuffled, some shared by all rows, NaN in the slots and
  pages that nobody uses and anything in their entries of the table: bits of the contiguous cache.
- options: sliding windows, a soft cap, head_dim 256: decode against row t of the prefill and
  against float64, all schedules, pages (anything in entries of the table before the window too),
  a window longer than the context against none.
- control: `jax.nn.dot_product_attention` (xla, cudnn) over batch sizes must show more than
  one bit pattern in row 0.

Then timings: device time by CUPTI, inputs rotated over at least 250 MB, medians; ours and cuDNN's,
in decode with pages of 64 slots too, and the floor (bytes over the measured copy rate, or
operations over the measured matrix rate). Every mismatch is reported and makes it exit with 1.
Work is spread over processes, because the time goes to compiling; one process at a time is timed,
after the checks.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

SPLIT = 256
QWEN = (32, 8, 128)  # heads, heads of keys, head_dim
SMOL = (9, 3, 64)
GEMMA_1B, GEMMA_4B = (4, 1, 256), (8, 4, 256)
DECODE = ((1, 4096), (1, 32768), (8, 1024), (8, 8192), (32, 2048), (64, 1024), (64, 4096))
DECODE = (*DECODE, (128, 1024), (128, 4096))
PAGE = 64  # slots, in the timings
PREFILL = ((1, 2048), (1, 4096), (1, 8192), (1, 32768), (8, 1024))


def _draw(seed, shape, dtype="bfloat16", poison=None):
    """Normal numbers on the device, the same everywhere."""
    import jax.numpy as jnp
    import numpy as np

    x = np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)
    if poison is not None:
        x = np.where(poison, np.float32(np.nan), x)
    return jnp.asarray(x).astype(dtype)


def _bits(x):
    import jax
    import jax.numpy as jnp
    import numpy as np

    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16))


def _case(seed, batch, length, cache, sizes, positions, dtype="bfloat16"):
    """q, k, v, positions with NaN wherever nobody may look."""
    import jax.numpy as jnp
    import numpy as np

    heads, kv_heads, dim = sizes
    positions = np.asarray(positions, np.int32).reshape(batch, length)
    unseen = np.arange(cache)[None] > positions.max(1, keepdims=True)
    q = _draw(seed, (batch, length, heads, dim), dtype, (positions < 0)[..., None, None])
    k, v = (
        _draw(seed + i, (batch, kv_heads, cache, dim), dtype, unseen[:, None, :, None])
        for i in (1, 2)
    )
    return q, k, v, jnp.asarray(positions)


def _ours(q, k, v, positions, schedule=None, page_table=None, **options):
    from jdet.pallas_kernels.attention import mosaic_gpu

    return mosaic_gpu.attention(
        q,
        k,
        v,
        positions,
        scale=q.shape[-1] ** -0.5,
        kv_split=SPLIT,
        schedule=schedule,
        page_table=page_table,
        **options,
    )


def _rows_that_differ(a, b):
    import numpy as np

    a, b = (x if x.dtype == np.uint16 else _bits(x) for x in (a, b))
    return int((a != b).reshape(*a.shape[:2], -1).any(-1).sum())


def _sha(x):
    return hashlib.sha256(_bits(x).tobytes()).hexdigest()


def _consecutive(lasts, length, padding=0):
    """Positions of `length` queries that end, before some padding, at each of `lasts`."""
    import numpy as np

    out = np.full((len(lasts), length), -1)
    for i, last in enumerate(lasts):
        real = min(last + 1, length - (min(padding, length - 1) if i else 0))
        out[i, :real] = last - real + 1 + np.arange(real)
    return out


def run_oracle(job):
    import numpy as np

    sizes, length, dtype = job["sizes"], job["length"], job["dtype"]
    lasts = job["lasts"]
    args = _case(1, len(lasts), length, 1024, sizes, _consecutive(lasts, length, 5), dtype)
    y = _ours(*args)
    again = _ours(*args)
    q, k, v = (np.nan_to_num(np.asarray(a).astype(np.float64)) for a in args[:3])
    positions = np.asarray(args[3])
    group = sizes[0] // sizes[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    score = np.einsum("bthd,bhsd->bhts", q, k) * sizes[2] ** -0.5
    seen = np.arange(1024)[None, None] <= positions[:, :, None]
    score = np.where(seen[:, None], score, -np.inf)
    p = np.exp(score - np.maximum(score.max(-1, keepdims=True), -1e30))
    total = p.sum(-1, keepdims=True)
    want = np.einsum("bhts,bhsd->bthd", p / np.where(total == 0, 1, total), v)
    got = np.asarray(y).astype(np.float64)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    wrong = []
    bound = 5e-3 if dtype == "bfloat16" else 1e-3
    if not error < bound:
        wrong.append(f"relative error {error:.2e} over {bound:.0e}")
    if _bits(y)[positions < 0].any():
        wrong.append("padding is not zero")
    if _rows_that_differ(y, again):
        wrong.append("two runs differ")
    return {"error": error, "calls": 2, "sha256": _sha(y), "wrong": wrong}


def run_schedules(job):
    from jdet.pallas_kernels.attention import mosaic_gpu

    sizes, length, dtype = job["sizes"], job["length"], job["dtype"]
    lasts = job["lasts"]
    positions = _consecutive(lasts, length, length // 3)
    args = _case(4, len(lasts), length, 2048, sizes, positions, dtype)
    first_schedule = mosaic_gpu.Schedule("walked")
    first = _ours(*args, first_schedule)
    wrong = []
    others = [s for s in mosaic_gpu.schedules(length, sizes[2]) if s != first_schedule]
    for s in others:
        differ = _rows_that_differ(_ours(*args, s), first)
        if differ:
            wrong.append(f"{differ} rows differ under {s}")
    return {"calls": 1 + len(others), "sha256": _sha(first), "wrong": wrong}


def run_decode(job):
    import jax
    import jax.numpy as jnp
    import numpy as np

    sizes, length, batch = job["sizes"], 8192, 64
    q, k, v, positions = _case(7, 1, length, length, sizes, np.arange(length))
    prefill = _bits(_ours(q, k, v, positions))
    edges = [i + e for i in range(0, length + 1, SPLIT) for e in (-2, -1, 0, 1)]
    contexts = sorted({t for t in [*edges, *range(0, length, 47)] if 0 <= t < length})
    contexts += [0] * (-len(contexts) % batch)
    contexts = np.random.default_rng(0).permutation(contexts)

    @jax.jit
    def poisoned(cache, t):
        unseen = jnp.arange(length) > t[:, None]
        return jnp.where(unseen[:, None, :, None], jnp.nan, cache).astype(cache.dtype)

    wrong = 0
    for i in range(0, len(contexts), batch):
        t = jnp.asarray(contexts[i : i + batch], jnp.int32)
        y = _ours(q[0][t][:, None], poisoned(k, t), poisoned(v, t), t[:, None])
        wrong += int((_bits(y)[:, 0] != prefill[0][np.asarray(t)]).any((1, 2)).sum())
    return {
        "calls": len(contexts),
        "sha256": hashlib.sha256(prefill.tobytes()).hexdigest(),
        "wrong": [f"{wrong} of {len(contexts)} contexts differ"] if wrong else [],
    }


def run_batches(job):
    import numpy as np

    lasts = np.random.default_rng(3).integers(0, 1024, 128)
    lasts[:4] = (1000, 0, 1023, 255)
    q, k, v, positions = _case(9, 128, 1, 1024, job["sizes"], lasts)
    whole, wrong = _bits(_ours(q, k, v, positions)), []
    for b in job["batches"]:
        differ = _rows_that_differ(_ours(q[:b], k[:b], v[:b], positions[:b]), whole[:b])
        if differ:
            wrong.append(f"{differ} rows differ at batch {b}")
    return {
        "calls": 1 + len(job["batches"]),
        "wrong": wrong,
        "sha256": hashlib.sha256(whole.tobytes()).hexdigest(),
    }


def run_neighbours(job):
    import jax.numpy as jnp
    import numpy as np

    cache = 32768
    q, k, v, positions = _case(11, 1, 1, cache, job["sizes"], [1000])
    small = _bits(_ours(q, k[:, :, :1024], v[:, :, :1024], positions))
    wrong = []
    lasts = np.array([1000, 0, 32767, 4095, 4096, 20000, 1, 300])
    q8, k8, v8, _ = _case(13, 8, 1, cache, job["sizes"], lasts)
    for shift in (0, 1, 5):
        place = (0 + shift) % 8
        q8_, k8_, v8_ = (
            jnp.roll(x, shift, 0).at[place].set(mine[0]) for x, mine in ((q8, q), (k8, k), (v8, v))
        )
        y = _ours(q8_, k8_, v8_, jnp.asarray(np.roll(lasts, shift), jnp.int32)[:, None])
        if (_bits(y)[place] != small[0]).any():
            wrong.append(f"differs from itself alone, at place {place}")
    return {"calls": 4, "wrong": wrong}


def run_chunks(job):
    import numpy as np

    length = 1000
    q, k, v, positions = _case(15, 1, length, 2048, job["sizes"], np.arange(length))
    whole, wrong = _bits(_ours(q, k, v, positions)), []
    for size in job["chunk_sizes"]:
        for start in range(0, length, size):
            stop = min(start + size, length)
            filled = np.arange(2048)[None, None, :, None] < stop
            k_part, v_part = (
                np.where(filled, np.asarray(c), np.nan).astype(c.dtype) for c in (k, v)
            )
            part = _ours(q[:, start:stop], k_part, v_part, positions[:, start:stop])
            differ = _rows_that_differ(part, whole[:, start:stop])
            if differ:
                wrong.append(f"{differ} rows differ in chunk {start}:{stop} of {size}")
    return {"calls": 1 + sum(-(-length // c) for c in job["chunk_sizes"]), "wrong": wrong}


def _pages(k, v, lasts, size, shared):
    """The caches in shuffled pages; the first `shared` pages of row 0 are those of every row."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(size)
    batch, heads, slots, dim = k.shape
    width = slots // size
    count = batch * width + 3
    table = rng.permutation(count)[: batch * width].reshape(batch, width)
    sides = []
    for cache in (k, v):
        pages = np.full((count, heads, size, dim), np.nan, cache.dtype)
        pages[table] = np.asarray(cache).reshape(batch, heads, width, size, dim).swapaxes(1, 2)
        pages[table[1:, :shared]] = np.nan
        sides.append(jnp.asarray(pages))
    table[:, :shared] = table[0, :shared]
    unused = np.arange(width) * size > np.asarray(lasts)[:, None]
    anything = rng.choice([-1, -(2**31), 2**31 - 1, count, 0], table.shape)
    return *sides, jnp.asarray(np.where(unused, anything, table), jnp.int32)


def run_paged(job):
    sizes, length, lasts = job["sizes"], job["length"], job["lasts"]
    positions = _consecutive(lasts, length, length // 3)
    q, k, v, positions = _case(17, len(lasts), length, 2048, sizes, positions)
    common = min(*lasts, 511) + 1
    k, v = (c.at[1:, :, :common].set(c[0, :, :common]) for c in (k, v))
    whole, wrong = _ours(q, k, v, positions), []
    for size in (16, 64, 256):
        k_pages, v_pages, table = _pages(k, v, lasts, size, common // size)
        differ = _rows_that_differ(_ours(q, k_pages, v_pages, positions, None, table), whole)
        if differ:
            wrong.append(f"{differ} rows differ with pages of {size}")
    return {"calls": 4, "sha256": _sha(whole), "wrong": wrong}


def _steps(q, k, v, at, window):
    """The queries at positions `at` of one row, as rows of their own; NaN outside their windows."""
    import jax.numpy as jnp

    key = jnp.arange(k.shape[2])
    seen = (key <= at[:, None]) & (key > at[:, None] - (window or k.shape[2]))
    k, v = (jnp.where(seen[:, None, :, None], x, jnp.nan).astype(x.dtype) for x in (k, v))
    return q[0][at][:, None], k, v, jnp.asarray(at[:, None], jnp.int32)


def _wanted(q, k, v, positions, sliding_window=None, soft_cap=None):
    """In float64, for one query a row."""
    import numpy as np

    q, k, v = (np.nan_to_num(np.asarray(x).astype(np.float64)) for x in (q, k, v))
    group, positions = q.shape[2] // k.shape[1], np.asarray(positions)
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    score = np.einsum("bthd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
    if soft_cap is not None:
        score = soft_cap * np.tanh(score / soft_cap)
    key = np.arange(k.shape[2])
    seen = (key <= positions) & (key > positions - (sliding_window or k.shape[2]))
    score = np.where(seen[:, None, None], score, -np.inf)
    p = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("bhts,bhsd->bthd", p / p.sum(-1, keepdims=True), v)


def run_options(job):
    """One form of one set of options, against the prefill of a prompt."""
    import jax.numpy as jnp
    import numpy as np
    import timing  # pyright: ignore[reportMissingImports]

    from jdet.pallas_kernels.attention import mosaic_gpu

    sizes, options, form, length = job["sizes"], job["options"], job["form"], job["length"]
    window, cache = options.get("sliding_window"), -(-(length + 1) // SPLIT) * SPLIT
    q, k, v, positions = args = _case(19, 1, length, cache, sizes, np.arange(length))
    # Where a query, or the window of one, is the first or the last of a split.
    edges = {i + e for i in range(0, length + 1, SPLIT) for e in (-2, -1, 0, 1, 43, 44)}
    edges |= {t + (window or 0) for t in edges}
    at = np.random.default_rng(0).permutation([t for t in sorted(edges) if 0 <= t < length])
    at = at[: 40 if length < 1000 else 8]
    steps = _steps(q, k, v, at, window)
    out, wrong, calls = {}, [], 0

    def compare(name, y, expected):
        nonlocal calls
        calls += 1
        differ = _rows_that_differ(y, expected)
        if differ:
            wrong.append(f"{differ} rows differ: {name}")

    if form == "prefill schedules":
        first, *others = mosaic_gpu.schedules(length, sizes[2])[2:]
        whole = _ours(*args, first, **options)
        for s in others:
            compare(s, _ours(*args, s, **options), whole)
    elif form == "decode schedules":
        first, *others = mosaic_gpu.schedules(1, sizes[2])[1:]
        whole = _ours(*steps, first, **options)
        for s in others:
            compare(s, _ours(*steps, s, **options), whole)
    elif form == "pages":
        whole = _ours(*steps, **options)
        for size in (16, 64):
            k_pages, v_pages, table = _pages(*steps[1:3], at, size, 0)
            if window is not None:
                before = (np.arange(table.shape[1]) + 1) * size <= at[:, None] - window + 1
                table = jnp.where(before, -7, table)
            y = _ours(steps[0], k_pages, v_pages, steps[3], None, table, **options)
            compare(f"decode, pages of {size}", y, whole)
        k_pages, v_pages, table = _pages(k, v, [length - 1], 16, 0)
        whole = _ours(*args, **options)
        y = _ours(q, k_pages, v_pages, positions, None, table, **options)
        compare("prefill, pages", y, whole)
    else:
        whole = _ours(*args, **options)
        y = _ours(*steps, **options)
        compare("decode", y, whole[0, at][:, None])
        compare("again", _ours(*steps, **options), y)
        want, got = _wanted(*steps, **options), np.asarray(y).astype(np.float64)
        out["error"] = error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        if not error < 5e-3:
            wrong.append(f"relative error {error:.2e}")
        if window is not None and window >= length:
            rest = {k: x for k, x in options.items() if k != "sliding_window"}
            compare("no window", _ours(*args, **rest), whole)
    out |= {"calls": calls, "sha256": _sha(whole), "environment": timing.environment()}
    return {**out, "wrong": wrong}


def run_control(job):
    import functools

    import jax

    heads, kv_heads, dim = QWEN
    q = _draw(1, (64, 1, heads, dim))
    k, v = (_draw(i, (64, 2048, kv_heads, dim)) for i in (2, 3))
    f = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation=job["name"]))
    groups = {}
    for b in (1, 2, 3, 4, 8, 16, 64):
        groups.setdefault(_bits(f(q[:b], k[:b], v[:b])[0]).tobytes(), []).append(b)
    wrong = [] if len(groups) > 1 else ["one bit pattern only"]
    return {"patterns": sorted(groups.values()), "calls": 7, "wrong": wrong}


def run_time(job):
    """Compiled side by side, timed one after another under the lock."""
    import functools

    import jax
    import jax.numpy as jnp
    import timing  # pyright: ignore[reportMissingImports]
    from cudnn_attention import CudnnOps  # pyright: ignore[reportMissingImports]

    heads, kv_heads, dim = QWEN
    batch, context, length = job["batch"], job["context"], job["length"]
    kv_bytes = 2 * batch * context * kv_heads * dim * 2
    copies = min(timing.copies_for(kv_bytes), 16)

    def ours(qs, ks, vs, positions, table=None):
        return [_ours(q, k, v, positions, None, table) for q, k, v in zip(qs, ks, vs, strict=True)]

    cudnn_one = functools.partial(
        jax.nn.dot_product_attention, is_causal=length > 1, implementation="cudnn"
    )

    def cudnn(qs, ks, vs, positions):
        del positions
        return [cudnn_one(q, k, v) for q, k, v in zip(qs, ks, vs, strict=True)]

    def cudnn_paged(qs, ks, vs, positions, table):
        one = functools.partial(CudnnOps("xla").attention, page_table=table)
        return [one(q, k, v, positions) for q, k, v in zip(qs, ks, vs, strict=True)]

    @functools.partial(jax.jit, static_argnums=1)
    def draw(seed, shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    positions = jnp.broadcast_to(
        context - length + jnp.arange(length, dtype=jnp.int32), (batch, length)
    )
    row = {"op": "attention", "batch": batch, "context": context, "queries": length}
    q_shape = (batch, length, heads, dim)
    forms = {
        "ours_us": (ours, (batch, kv_heads, context, dim), ()),
        "cudnn_us": (cudnn, (batch, context, kv_heads, dim), ()),
    }
    if length == 1:
        count = batch * context // PAGE
        table = jax.random.permutation(jax.random.key(0), count).reshape(batch, -1)
        pages = (count, kv_heads, PAGE, dim), (table.astype(jnp.int32),)
        forms |= {"paged_us": (ours, *pages), "cudnn_paged_us": (cudnn_paged, *pages)}
    programs = {}
    for name, (f, kv_shape, tables) in forms.items():
        shapes = [
            [jax.ShapeDtypeStruct(s, jnp.bfloat16)] * copies for s in (q_shape, kv_shape, kv_shape)
        ]
        start = time.perf_counter()
        programs[name] = jax.jit(f).lower(*shapes, positions, *tables).compile()
        row[name.replace("_us", "_compile_s")] = round(time.perf_counter() - start, 2)
    with LOCK:
        for name, (_, kv_shape, tables) in forms.items():
            args = [
                [draw(100 * j + i, s) for i in range(copies)]
                for j, s in enumerate((q_shape, kv_shape, kv_shape))
            ]
            us = timing.device_us(programs[name], *args, positions, *tables)
            row[name] = round(us / copies, 2)
            del args
    row["bytes"] = kv_bytes + 2 * 2 * batch * length * heads * dim
    row["operations"] = (
        4 * batch * heads * dim * (context if length == 1 else length * (length + 1) // 2)
    )
    return {"row": row, "calls": 1, "wrong": []}


def run_ceilings(job):
    import timing  # pyright: ignore[reportMissingImports]

    del job
    with LOCK:
        return {
            "copy": timing.copy_rate(),
            "matrix": timing.matrix_rate(),
            "calls": 1,
            "wrong": [],
            "environment": timing.environment(),
        }


LOCK: Any = None  # of the device, set in every worker


def _start(lock):
    global LOCK
    LOCK = lock


def dispatch(job):
    start = time.perf_counter()
    try:
        result = globals()["run_" + job["check"]](job)
    except Exception as e:  # reported: one failure must not hide the others
        result = {"calls": 0, "wrong": [f"{type(e).__name__}: {str(e)[:600]}"]}
    return {**job, **result, "seconds": round(time.perf_counter() - start, 1)}


def jobs():
    """Ordered so that the widest coverage comes first."""
    out = [{"check": "decode", "sizes": QWEN}]
    for sizes, dtype in ((QWEN, "bfloat16"), (SMOL, "bfloat16"), (QWEN, "float16")):
        for length, lasts in ((1, (0, 700, 1023, 255, 256)), (300, (299, 900, 400))):
            out.append(
                {
                    "check": "oracle",
                    "sizes": sizes,
                    "dtype": dtype,
                    "length": length,
                    "lasts": lasts,
                }
            )
    cases = [(QWEN, 1), (QWEN, 70), (QWEN, 700), (SMOL, 1), (SMOL, 333), ((16, 16, 64), 1)]
    cases += [((28, 4, 128), 1), ((28, 4, 128), 90), ((32, 2, 128), 1), ((32, 2, 128), 50)]
    cases += [((8, 8, 128), 150), ((5, 1, 64), 1)]
    for sizes, length in cases:
        lasts = (length - 1, 1500, 2047) if length > 1 else (0, 1, 254, 255, 256, 257, 2047)
        out.append(
            {
                "check": "schedules",
                "sizes": sizes,
                "dtype": "bfloat16",
                "length": length,
                "lasts": lasts,
            }
        )
    out += [{"check": "control", "name": name} for name in ("xla", "cudnn")]
    every = (1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 127)
    out += [{"check": "batches", "sizes": QWEN, "batches": every[i::5]} for i in range(5)]
    out += [{"check": "neighbours", "sizes": QWEN}]
    for sizes, length in ((QWEN, 1), (QWEN, 70), (QWEN, 300), (SMOL, 1), (SMOL, 333)):
        lasts = (2047, 1500, max(length - 1, 700), 1023)
        out.append({"check": "paged", "sizes": sizes, "length": length, "lasts": lasts})
    out += [
        {"check": "chunks", "sizes": QWEN, "chunk_sizes": c} for c in ((256,), (100, 333), (17,))
    ]
    long = {"sliding_window": 4096}
    both = {"sliding_window": 300, "soft_cap": 50.0}
    cases = [(QWEN, 700, {"sliding_window": w}) for w in (1, 100, 256, 300)]
    cases += [(QWEN, 700, long), (QWEN, 4700, long), (QWEN, 700, {"soft_cap": 50.0})]
    cases += [(SMOL, 700, both), (GEMMA_1B, 700, {"sliding_window": 512})]
    cases = [(*case, "steps") for case in cases]
    for form in ("steps", "prefill schedules", "decode schedules", "pages"):
        cases += [(QWEN, 700, both, form), (GEMMA_4B, 700, {}, form), (GEMMA_4B, 700, both, form)]
    for sizes, length, options, form in cases:
        job = {"sizes": sizes, "length": length, "options": options, "form": form}
        out.append({"check": "options", **job})
    return out


def time_jobs():
    out = [{"check": "ceilings"}]
    shapes = [("decode times", b, c, 1) for b, c in DECODE]
    shapes += [("prefill times", b, c, c) for b, c in PREFILL]
    return out + [
        {"check": "time", "part": part, "batch": b, "context": c, "length": length}
        for part, b, c, length in shapes
    ]


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", help="checks to run, by name, or a part of `time`")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument(
        "--limit", type=float, default=480, help="seconds until it reports what it has"
    )
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    end, context = time.monotonic() + args.limit, multiprocessing.get_context("spawn")
    rows, missing = [], 0
    pool = context.Pool(args.jobs, _start, (context.Lock(),))
    for phase in (jobs(), time_jobs()):
        todo = [j for j in phase if not args.only or {j["check"], j.get("part")} & {*args.only}]
        results = pool.imap_unordered(dispatch, todo)
        for i in range(len(todo)):
            try:
                r = results.next(timeout=max(0.1, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                missing += len(todo) - i
                break
            rows.append(r)
            shown = {k: v for k, v in r.items() if k not in ("sha256", "environment")}
            print("FAIL" if r["wrong"] else "ok  ", shown, flush=True)
    pool.terminate()

    named = ("sizes", "length", "batch", "options", "form")
    failures = [
        [r["check"], str({k: r[k] for k in r if k in named}), w] for r in rows for w in r["wrong"]
    ]
    if missing:
        failures.append(["all", "", f"{missing} jobs not finished"])
    ceilings = next((r for r in rows if r["check"] == "ceilings" and "copy" in r), None)
    env = next((r["environment"] for r in rows if "environment" in r), {})
    table = [r["row"] for r in rows if "row" in r]
    for row in sorted(table, key=lambda r: (r["queries"] > 1, r["batch"], r["context"])):
        if ceilings:
            floor = max(row["bytes"] / ceilings["copy"], row["operations"] / ceilings["matrix"])
            row["floor_us"] = round(floor * 1e6, 2)
            row["ratio"] = round(row["ours_us"] / row["cudnn_us"], 3)
            if "paged_us" in row:
                row["paged_ratio"] = round(row["paged_us"] / row["cudnn_paged_us"], 3)
        print({k: v for k, v in row.items() if k not in ("op", "bytes", "operations")})
    if ceilings:
        rates = ceilings["copy"] / 1e12, ceilings["matrix"] / 1e12
        print("copy {:.3f} TB/s, matrix {:.0f} TFLOP/s".format(*rates))
    print(f"{len(failures)} failures, {sum(r['calls'] for r in rows)} calls")
    if args.json:
        out = {
            **env,
            "failures": failures,
            "copy_bytes_per_s": ceilings and ceilings["copy"],
            "matrix_flops_per_s": ceilings and ceilings["matrix"],
            "method": "CUPTI device time, median of 7, inputs rotated over >= 250 MB",
            "rows": table,
            "checks": sorted(
                (
                    {k: v for k, v in r.items() if k not in ("row", "environment")}
                    for r in rows
                    if r["check"] not in ("time", "ceilings")
                ),
                key=lambda r: json.dumps(r, default=str),
            ),
        }
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
