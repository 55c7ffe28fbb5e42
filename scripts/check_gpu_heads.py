"""Bit-for-bit checks and timings of the Mosaic GPU heads (op `qkv_heads`) on a real device.

    python scripts/check_gpu_heads.py --json h100-heads.json

Checks, for the heads of Qwen3-8B with norms, of SmolLM2 without, and of Gemma 3 with norms that are
float32, on fixed normal inputs:

- tokens: each token of a batch of 1 to 1000, one a row or many in a row, has the bits that it has
  in a batch of 4096 of one token a row: its q, and its key and value in their slots. Every other
  slot keeps its bits. Padding, a whole row of it too, is NaN. Each call runs twice.
- schedules: both, over some of those batches; float16; pages that stand in any order.
- oracle: distance to a float64 computation in numpy.
- place: a donated cache is updated where it stands.

Then timings: device time by CUPTI of a chain of calls on different inputs, median, a call; ours
under both schedules, the composition on plain XLA, and the floor (bytes over the measured copy
rate). The copy of the caches at the chain's start is no kernel and is not counted. Every mismatch
is reported and makes it exit with 1. `sha256` hashes the results of the batch of 4096.
"""

import argparse
import functools
import hashlib
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jdet.pallas_kernels.qkv_heads import mosaic_gpu, xla

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import timing  # pyright: ignore[reportMissingImports]  # noqa: E402

EPS = 1e-6
TOP, SLOTS = 4096, 4
# Heads, heads of keys, head_dim, and the dtype of the norms: the heads' ("alike"), or None.
QWEN, SMOL, GEMMA = (32, 8, 128, "alike"), (9, 3, 64, None), (8, 4, 256, "float32")
SPLIT, WHOLE = mosaic_gpu.SCHEDULES
TOKENS = (*range(1, 10), 63, 64, 65, 257, 1000)
# (size, dtype, [(rows, tokens a row, schedule)])
BATCHES = (
    (QWEN, "bfloat16", [(n, 1, None) for n in TOKENS]),
    (QWEN, "bfloat16", [(n, 1, s) for n in (1, 65) for s in mosaic_gpu.SCHEDULES]),
    (QWEN, "bfloat16", [(1, 257, SPLIT), (1, 1000, WHOLE), (5, 13, SPLIT), (3, 333, SPLIT)]),
    (SMOL, "bfloat16", [(n, 1, None) for n in (1, 2, 9, 64, 1000)]),
    (SMOL, "bfloat16", [(1, 65, WHOLE), (1, 257, SPLIT), (4, 63, WHOLE)]),
    (QWEN, "float16", [(7, 1, SPLIT), (2, 65, WHOLE)]),
    (GEMMA, "bfloat16", [(n, 1, None) for n in (1, 2, 9, 64, 1000)]),
    (GEMMA, "bfloat16", [(1, 65, WHOLE), (1, 257, SPLIT), (4, 63, WHOLE)]),
)
# (rows, tokens a row, slots): a token, a batch of them, eight prompts.
TIMES = ((1, 1, 1024), (64, 1, 256), (8, 1024, 1024))


def inputs(size, count, dtype, seed=0):
    """qkv, cos and sin of `count` tokens, and the norms' weights, in numpy."""
    heads, kv_heads, dim, norms = size
    rng = np.random.default_rng([seed, heads])
    qkv = rng.standard_normal((count, (heads + 2 * kv_heads) * dim), np.float32)
    angle = rng.integers(0, 2**15, count)[:, None] * 1e6 ** (-np.arange(0, dim, 2) / dim)
    tokens = (qkv.astype(dtype), np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
    if norms is None:
        return tokens, (None, None)
    weights = 1 + rng.standard_normal((2, dim), np.float32) / 4
    return tokens, weights.astype(dtype if norms == "alike" else norms)


def bits(x):
    return np.asarray(x).view(np.uint16)


@functools.partial(jax.jit, static_argnames="schedule")
def ours(tokens, weights, positions, caches, page_table=None, schedule=None):
    (qkv, cos, sin), (q_norm, k_norm), (k, v) = tokens, weights, caches
    return mosaic_gpu.qkv_heads(
        qkv,
        q_norm,
        k_norm,
        cos,
        sin,
        positions,
        k,
        v,
        eps=EPS,
        page_table=page_table,
        schedule=schedule,
    )


class Check:
    """One size and dtype: what its tokens' bits are, and batches to compare."""

    def __init__(self, size, dtype):
        self.size, self.dtype = size, jnp.dtype(dtype)
        self.name = f"{size[:3]} {dtype}"
        self.tokens, self.weights = inputs(size, TOP, self.dtype)
        # More slots than tokens, and what they hold before: any bits, NaN among them.
        self.rng = np.random.default_rng(1)
        at = self.rng.integers(0, SLOTS, (TOP, 1)).astype(np.int32)
        q, k, v = self.call(at, np.arange(TOP)[:, None], self.caches(TOP, SLOTS), SPLIT)
        rows = np.arange(TOP)
        self.expected = q[:, 0], k[rows, :, at[:, 0]], v[rows, :, at[:, 0]]
        digest = hashlib.sha256()
        for x in self.expected:
            digest.update(np.ascontiguousarray(x).tobytes())
        self.sha256 = digest.hexdigest()

    def caches(self, pages, slots):
        shape = (2, pages, self.size[1], slots, self.size[2])
        return self.rng.integers(0, 2**16, shape, np.uint16).view(self.dtype)

    def call(self, positions, pick, caches, schedule, page_table=None):
        tokens = [x[pick] for x in self.tokens]
        for x in tokens:
            x[positions < 0] = np.nan
        out = ours(tokens, self.weights, positions, tuple(caches), page_table, schedule)
        return [bits(x) for x in out]

    def batch(self, rows, length, schedule, *, paged=False):
        """What is wrong with a batch of rows x length tokens, as a list of words."""
        pick = self.rng.integers(0, TOP, (rows, length))
        slots = -(-(length + 3) // 8) * 8
        positions = self.rng.integers(0, 4, (rows, 1)) + np.arange(length)
        if rows > 1:  # the second row is padding, and so is the end of the last
            positions[1] = -1
        if length > 1:
            positions[-1, -max(1, length // 3) :] = -1
        positions = positions.astype(np.int32)
        row, column = np.nonzero(positions >= 0)
        slot, token = positions[row, column], pick[row, column]
        page, table = row, None
        caches = self.caches(rows, slots)
        if paged:
            table = self.rng.permutation(rows * slots // 4).astype(np.int32).reshape(rows, -1)
            caches, page, slot = self.caches(table.size, 4), table[row, slot // 4], slot % 4
        want = bits(caches).copy()
        want[0][page, :, slot], want[1][page, :, slot] = (x[token] for x in self.expected[1:])
        wrong = []
        for again in ("first", "second"):
            q, k, v = self.call(positions, pick, caches, schedule, table)
            for name, got, right in (
                ("q", q[row, column], self.expected[0][token]),
                ("keys", k, want[0]),
                ("values", v, want[1]),
            ):
                count = int((got != right).any(-1).sum())
                if count:
                    wrong.append(f"{count} heads of {name} differ, {again} run")
        return wrong

    def oracle(self):
        """Relative distance of q and k of some tokens to float64."""
        heads, kv_heads, dim, _ = self.size
        some = slice(0, 256)
        qkv, cos, sin = (x[some].astype(np.float64) for x in self.tokens)
        x = qkv.reshape(len(qkv), -1, dim)
        got = np.concatenate([y[some] for y in self.expected[:2]], axis=1).view(self.dtype)
        parts = x[:, :heads], x[:, heads : heads + kv_heads]
        turned = []
        for part, weight in zip(parts, self.weights, strict=True):
            if weight is not None:
                part = part / np.sqrt((part**2).mean(-1, keepdims=True) + EPS)
                part = part * weight.astype(np.float64)
            turned.append(part[..., : dim // 2] + 1j * part[..., dim // 2 :])
        turned = np.concatenate(turned, axis=1) * (cos + 1j * sin)[:, None]
        want = np.concatenate([turned.real, turned.imag], axis=-1)
        error = float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
        bound = 5e-3 if self.dtype == jnp.bfloat16 else 1e-3
        wrong = [] if error < bound else [f"relative error {error:.2e} over {bound:.0e}"]
        if (
            self.expected[2][some] != bits(self.tokens[0][some]).reshape(x.shape)[:, -kv_heads:]
        ).any():
            wrong.append("values are not copied")
        return error, wrong


def check_place():
    """What is wrong with a donated cache's place."""
    tokens, weights = inputs(QWEN, 2, jnp.bfloat16)
    shape = (2, QWEN[1], 64, QWEN[2])
    k, v = (jnp.zeros(shape, jnp.bfloat16) for _ in "kv")
    before = k.unsafe_buffer_pointer(), v.unsafe_buffer_pointer()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(k, v):
        return ours(
            [jnp.asarray(x)[:, None] for x in tokens], weights, jnp.zeros((2, 1), jnp.int32), (k, v)
        )

    _, k, v = step(k, v)
    after = k.unsafe_buffer_pointer(), v.unsafe_buffer_pointer()
    return [] if after == before else ["a donated cache came back in another place"]


def time_heads(rows, length, slots, rate):
    """One row of the table of times."""
    heads, kv_heads, dim, _ = QWEN
    count = rows * length
    nbytes = 2 * count * (heads + 2 * kv_heads) * dim * 2 + count * dim * 4
    calls = min(16, timing.copies_for(nbytes))
    tokens, weights = inputs(QWEN, count, jnp.bfloat16)
    tokens = [jnp.asarray(x).reshape(rows, length, -1) for x in tokens]
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    caches = [jnp.zeros((rows, kv_heads, slots, dim), jnp.bfloat16) for _ in "kv"]
    qkvs = [tokens[0] + i for i in range(calls)]

    def composed(tokens, weights, positions, caches):
        return xla.qkv_heads(tokens[0], *weights, *tokens[1:], positions, *caches, eps=EPS)

    forms = {
        "ours_split_us": functools.partial(ours, schedule=SPLIT),
        "ours_whole_us": functools.partial(ours, schedule=WHOLE),
        "xla_us": composed,
    }
    row = {"rows": rows, "tokens_a_row": length, "calls": calls, "bytes": nbytes}
    for name, form in forms.items():

        @jax.jit
        def chain(qkvs, angles, caches, form=form):
            results = []
            for qkv in qkvs:
                q, *caches = form([qkv, *angles], weights, positions, caches)
                results.append(q)
            return results, caches

        row[name] = round(timing.device_us(chain, qkvs, tokens[1:], caches) / calls, 2)
    row["floor_us"] = round(nbytes / rate * 1e6, 2)
    row["default"] = str(mosaic_gpu.default_schedule(count))
    return row


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-times", action="store_true")
    args = parser.parse_args()
    start = time.perf_counter()
    failures, hashes, errors, calls, checks = [], {}, {}, 0, {}
    for size, dtype, batches in BATCHES:
        key = (size, dtype)
        if key not in checks:
            check = checks[key] = Check(size, dtype)
            hashes[check.name] = check.sha256
            errors[check.name], wrong = check.oracle()
            failures += [[check.name, "oracle", w] for w in wrong]
        check = checks[key]
        for batch in batches:
            failures += [[check.name, str(batch), w] for w in check.batch(*batch)]
            calls += 2
    for batch in ((9, 1, SPLIT), (3, 65, WHOLE)):
        wrong = checks[QWEN, "bfloat16"].batch(*batch, paged=True)
        failures += [["paged", str(batch), w] for w in wrong]
        calls += 2
    failures += [["place", "", w] for w in check_place()]
    checked = time.perf_counter() - start
    print(f"{calls} calls, {len(failures)} failures, {checked:.1f} s; errors {errors}", flush=True)
    for f in failures[:40]:
        print("FAIL", *f)
    times = []
    if not args.skip_times:
        rate = timing.copy_rate()
        times = [time_heads(*case, rate) for case in TIMES]
        for row in times:
            print(row, flush=True)
    result = {
        **timing.environment(),
        "failures": failures,
        "calls": calls,
        "relative_errors": errors,
        "sha256": hashes,
        "times": times,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['seconds']} s, {result['device']}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
