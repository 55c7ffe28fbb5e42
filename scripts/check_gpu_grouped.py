"""Bit-for-bit checks and timings of the Mosaic GPU grouped matmuls, on a Hopper card.

    python scripts/check_gpu_grouped.py --json h100-grouped.json
    python scripts/check_gpu_grouped.py --skip-times

Checks, on fixed normal inputs, bfloat16:

- schedules: every registered schedule, plain and gated, over groups of many sizes (even, skewed,
  empty, one row, 31, 32 and 33, all rows in one, none), gives each row the bits that the dense
  `matmul` or `gated_matmul` gives it with its expert's weights, and zeros after the last group.
  Each call runs twice. The rows of no group and the weights of empty groups hold NaN.
- leaves: the same in 2 and 8 leaves with float32 results, by the default schedules and in short
  tiles.
- default: Qwen3-30B-A3B's experts, 1 to 8192 tokens of 8 of 128 experts.
- tokens: the gated matmul of the same experts, 1 to 9 and 33 tokens found by `tokens`; a
  third of them, which hold NaN, is of no expert.
- oracle: distance to a float64 product.

Then device times (CUPTI, median) of ours, of `lax.ragged_dot` on weights stored [E, K, N] (as it
likes them), of the Hopper ragged dot that JAX bundles (one configuration; it knows no gate), and
the floor: the bytes of the experts touched, of x and of y over the measured copy rate, or
operations over the measured matrix rate. Weights over 250 MB are walked, so that L2 does not
serve them. Of the gated matmul the others compute the product alone.

It reports every mismatch and exits with 1 if there is one.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

E, R, N, K = 12, 600, 1000, 1032  # N no multiple of a tile, K with a tail of 8
GROUPS = (
    (50,) * 12,
    (600, *[0] * 11),
    (*[0] * 11, 600),
    (0,) * 12,
    (1,) * 12,
    (31, 32, 33, 0, 63, 64, 65, 0, 127, 128, 0, 7),
    (0, 8, 9, 7, 16, 17, 15, 1, 2, 0, 400, 3),
    (0, 0, 550, 0, 0, 0, 1, 0, 0, 0, 0, 49),
)
EXPERTS, CHOSEN, HIDDEN, INNER = 128, 8, 2048, 768  # Qwen3-30B-A3B
TOKENS = (1, 8, 32, 64, 256, 8192)
NAMED = (*range(1, 10), 33)


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> Any:
    """Normal bfloat16 numbers on the device."""
    import jax
    import jax.numpy as jnp

    return (jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * scale).astype(
        jnp.bfloat16
    )


def bits(y: Any) -> Any:
    """The elements as integers, on the device."""
    import jax.numpy as jnp
    from jax import lax

    return lax.bitcast_convert_type(y, jnp.uint16 if y.dtype.itemsize == 2 else jnp.uint32)


def by_expert(one: Any, x: Any, w: Any, sizes: Any) -> Any:
    """Each row's dense product with its own expert, every expert over all rows."""
    import jax.numpy as jnp
    from jax import lax

    ends, row = jnp.cumsum(sizes), jnp.arange(x.shape[0])[:, None]

    def add(y, expert):
        w, start, end = expert
        return jnp.where((start <= row) & (row < end), one(x, w), y), None

    like = one(x, w[0])
    return lax.scan(add, jnp.zeros_like(like), (w, ends - sizes, ends))[0]


def poisoned(x: Any, w: Any, sizes: Any) -> tuple[Any, Any]:
    """NaN in the rows of no group and in the weights of empty groups."""
    import jax.numpy as jnp

    grouped = jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes)
    nan = jnp.array(jnp.nan, x.dtype)
    return jnp.where(grouped, x, nan), jnp.where(sizes[:, None, None] > 0, w, nan)


class Report:
    """Cases and mismatches, collected."""

    def __init__(self) -> None:
        self.cases, self.failures, self.errors = {}, [], {}

    def check(self, name: str, case: str, wrong: int) -> None:
        """Count a case; keep it if `wrong` rows were."""
        self.cases[name] = self.cases.get(name, 0) + 1
        if wrong:
            self.failures.append([name, case, wrong])
            print("FAIL", name, case, wrong, flush=True)


def compiled(jobs: dict[Any, tuple[Any, tuple[Any, ...]]]) -> dict[Any, Any]:
    """Programs by key, compiled side by side; an exception in its place where one was raised."""
    import jax

    def build(job):
        f, arguments = job
        try:
            return jax.jit(f).lower(*arguments).compile()
        except Exception as error:  # reported with its case
            return error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(build, jobs.values()), strict=True))


def ours(op: str, **options: Any) -> tuple[Any, Any]:
    """(grouped, dense) functions of one op: of (x, w, sizes), and of (x, one expert's w)."""
    from jdet.pallas_kernels import implementation_of

    dense = implementation_of(op.removeprefix("grouped_"), "mosaic_gpu")
    return implementation_of(op, "mosaic_gpu"), functools.partial(dense, **options)


def check_groups(report: Report, quick: bool) -> None:
    """Sections schedules, leaves and oracle: one small shape, groups of many sizes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jdet.pallas_kernels.grouped_matmul.mosaic_gpu import schedules
    from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import SHORT

    x, w = normal(0, (R, K)), normal(1, (E, N, K), K**-0.5)
    all_sizes = [jnp.array(sizes, jnp.int32) for sizes in GROUPS]
    jobs, wanted = {}, {}
    cases: list[tuple[str, str, Any, dict[str, Any]]] = [
        (op, "schedules", s, {})
        for op, gated in (("grouped_matmul", False), ("grouped_gated_matmul", True))
        for s in schedules(out_size=2, gated=gated)
    ]
    if quick:
        cases = [c for c in cases if c[2].height == SHORT]
    for leaves in (2, 8):
        options = {"leaves": leaves, "out_dtype": jnp.float32}
        k = K // 64 * 64
        short = next(s for s in schedules(leaves, out_size=4) if s.height == SHORT)
        for schedule in (None, short):
            cases.append(("grouped_matmul", f"leaves={leaves} K={k}", schedule, options))
    for op, name, schedule, options in cases:
        xs, ws = (x, w) if not options else (x[:, : K // 64 * 64], w[..., : K // 64 * 64])
        grouped, dense = ours(op, **options)

        def differ(x, w, sizes, want, grouped=grouped, schedule=schedule, options=options):
            y = grouped(*poisoned(x, w, sizes), sizes, schedule=schedule, **options)
            return jnp.sum(jnp.any(bits(y) != bits(want), axis=1))

        def want(x, w, sizes, dense=dense):
            return by_expert(dense, x, w, sizes)

        reference = (op, name)
        if reference not in wanted:
            wanted[reference] = [jax.jit(want)(xs, ws, sizes) for sizes in all_sizes]
        arguments = (xs, ws, all_sizes[0], wanted[reference][0])
        jobs[op, name, str(schedule)] = (differ, arguments)
    for (op, name, schedule), program in compiled(jobs).items():
        arguments = jobs[op, name, schedule][1]
        for sizes, want, label in zip(all_sizes, wanted[op, name], GROUPS, strict=True):
            for _ in range(2):
                if isinstance(program, Exception):
                    report.check(f"{op} {name}", f"{schedule}: {str(program)[:200]}", R)
                    break
                wrong = int(program(*arguments[:2], sizes, want))
                report.check(f"{op} {name}", f"{schedule} {label}", wrong)
    x64, w64 = (np.asarray(v.astype(jnp.float32), np.float64) for v in (x, w))
    for op, kind in (("grouped_matmul", 0), ("grouped_gated_matmul", 1)):
        sizes = np.array(GROUPS[5])
        experts = np.repeat(np.arange(E), sizes)
        exact = np.stack([w64[e] @ x64[row] for row, e in enumerate(experts)])
        if kind:
            gate, up = np.split(exact, 2, axis=1)
            exact = gate / (1 + np.exp(-gate)) * up
        y = jax.jit(ours(op)[0])(x, w, all_sizes[5]).astype(jnp.float32)
        y = np.asarray(y, np.float64)[: len(exact)]
        error = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
        report.errors[op] = error
        report.check(f"{op} oracle", f"relative error {error:.2e}", int(error > 5e-3))


def choices(tokens: int, seed: int) -> Any:
    """Sizes of the groups of tokens that choose 8 of 128 experts each, at random."""
    import numpy as np

    rng = np.random.default_rng([tokens, seed])
    chosen = rng.random((tokens, EXPERTS)).argpartition(CHOSEN, axis=1)[:, :CHOSEN]
    return np.bincount(chosen.reshape(-1), minlength=EXPERTS).astype(np.int32)


def check_default(report: Report, weights: dict[str, Any], counts: tuple[int, ...]) -> None:
    """Section default: real shapes, and a tail of rows of no group."""
    import jax.numpy as jnp

    jobs = {}
    for tokens in counts:
        rows = tokens * CHOSEN + 3
        sizes = jnp.asarray(choices(tokens, 0))
        for op, w in weights.items():
            grouped, dense = ours(op)

            def differ(x, w, sizes, grouped=grouped, dense=dense):
                y, want = grouped(x, w, sizes), by_expert(dense, x, w, sizes)
                return jnp.sum(jnp.any(bits(y) != bits(want), axis=1))

            jobs[op, tokens] = (differ, (normal(tokens, (rows, w.shape[2])), w, sizes))
    for (op, tokens), program in compiled(jobs).items():
        failed = isinstance(program, Exception)
        wrong = 1 if failed else int(program(*jobs[op, tokens][1]))
        report.check(f"{op} default", f"tokens={tokens} {program if failed else ''}"[:300], wrong)


def check_tokens(report: Report, w: Any, counts: tuple[int, ...]) -> None:
    """Section tokens."""
    import jax.numpy as jnp
    import numpy as np

    grouped, dense = ours("grouped_gated_matmul")
    jobs = {}
    for m in counts:
        rng = np.random.default_rng(m)
        routed = np.flatnonzero(np.arange(m) % 3 != 1)
        chosen = rng.random((len(routed), EXPERTS)).argpartition(CHOSEN, axis=1)[:, :CHOSEN]
        expert, token = chosen.reshape(-1), np.repeat(routed, CHOSEN)
        rest = np.repeat(np.setdiff1d(np.arange(m), routed), CHOSEN)
        tokens = np.concatenate([token[np.lexsort((token, expert))], rest]).astype(np.int32)
        sizes = np.bincount(expert, minlength=EXPERTS).astype(np.int32)
        x = jnp.where((jnp.arange(m) % 3 != 1)[:, None], normal(m, (m, HIDDEN)), jnp.nan)

        def differ(x, w, sizes, tokens):
            y = grouped(x, w, sizes, tokens=tokens)
            return jnp.sum(jnp.any(bits(y) != bits(by_expert(dense, x[tokens], w, sizes)), axis=1))

        arguments = x.astype(w.dtype), w, jnp.asarray(sizes), jnp.asarray(tokens)
        jobs[m] = (differ, arguments)
    for m, program in compiled(jobs).items():
        failed = isinstance(program, Exception)
        wrong = 1 if failed else int(program(*jobs[m][1]))
        case = f"tokens={m} {program if failed else ''}"[:300]
        report.check("grouped_gated_matmul tokens", case, wrong)


def bundled(x: Any, w: Any, sizes: Any) -> Any:
    """The Hopper ragged dot in JAX."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    high = 128 if x.shape[0] > 64 * EXPERTS else 64
    return ragged_dot_mgpu.ragged_dot(
        x,
        w,
        group_sizes=sizes,
        block_m=high,
        block_n=128,
        block_k=64,
        max_concurrent_steps=4,
        grid_block_n=1,
        transpose_rhs=True,
    )


def time_real(weights: dict[str, Any]) -> list[dict[str, Any]]:
    """Times of every op and number of tokens."""
    import jax.numpy as jnp
    import numpy as np
    import timing  # pyright: ignore[reportMissingImports]
    from jax import lax

    copy, matrix = timing.copy_rate(), timing.matrix_rate()
    rows, jobs = [], {}
    for op, w in weights.items():
        turned = jnp.swapaxes(w, 1, 2)
        sides = {"ours": (ours(op)[0], w), "ragged_dot": (lax.ragged_dot, turned)}
        sides["bundled"] = (bundled, w)
        for tokens in TOKENS:
            one = choices(tokens, 0)
            n, k = w.shape[1:]
            out = n // 2 if "gated" in op else n
            touched = (one > 0).sum() * n * k * 2
            count = timing.copies_for(touched) if tokens < 8192 else 1
            sizes = [jnp.asarray(choices(tokens, i)) for i in range(count)]
            x = normal(tokens, (tokens * CHOSEN, k))
            touched = float(np.mean([(np.asarray(s) > 0).sum() for s in sizes]) * n * k * 2)
            bytes_floor = (touched + x.nbytes + x.shape[0] * out * 2) / copy
            floor = max(bytes_floor, 2 * x.shape[0] * n * k / matrix) * 1e6
            row = {"op": op, "tokens": tokens, "copies": count, "floor_us": floor}
            rows.append(row)
            for side, (f, stored) in sides.items():

                def walk(x, w, sizes, f=f):
                    return [f(x, w, s) for s in sizes]

                jobs[len(rows) - 1, side] = (walk, (x, stored, sizes))
    # XLA expands what it cannot group to every expert over all rows: too much for the prefill.
    jobs = {key: job for key, job in jobs.items() if key[1] != "ragged_dot" or fits(job)}
    for (index, side), program in compiled(jobs).items():
        row, (_, arguments) = rows[index], jobs[index, side]
        if isinstance(program, Exception):
            row[side] = f"{type(program).__name__}: {str(program)[:120]}"
            continue
        us = timing.device_us(program, *arguments, iterations=5) / row["copies"]
        row[f"{side}_us"] = us
    return rows


def fits(job: Any) -> bool:
    """Whether a ragged dot may be timed: if XLA expands x, 8 GB at most."""
    x = job[1][0]
    return x.nbytes * EXPERTS < 8e9


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="of schedules those of short tiles, and fewer sizes"
    )
    parser.add_argument("--skip-times", action="store_true")
    args = parser.parse_args()
    import timing  # pyright: ignore[reportMissingImports]

    start, report = time.perf_counter(), Report()
    check_groups(report, args.quick)
    print(f"groups: {time.perf_counter() - start:.0f} s", flush=True)
    weights = {
        "grouped_gated_matmul": normal(2, (EXPERTS, 2 * INNER, HIDDEN), HIDDEN**-0.5),
        "grouped_matmul": normal(3, (EXPERTS, HIDDEN, INNER), INNER**-0.5),
    }
    check_default(report, weights, TOKENS[:2] if args.quick else TOKENS)
    named = NAMED[::3] if args.quick else NAMED
    check_tokens(report, weights["grouped_gated_matmul"], named)
    print(f"default, tokens: {time.perf_counter() - start:.0f} s", flush=True)
    times = [] if args.skip_times else time_real(weights)
    for row in times:
        fields = (f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(fields))
    for name, count in report.cases.items():
        print(f"{name:44} {count:5} cases")
    print({op: f"{error:.2e}" for op, error in report.errors.items()})
    env = timing.environment()
    print(f"{len(report.failures)} failures, {env['device']}, {time.perf_counter() - start:.0f} s")
    if args.json:
        out = {
            **env,
            "failures": report.failures,
            "cases": report.cases,
            "oracle": report.errors,
            "times": times,
        }
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
