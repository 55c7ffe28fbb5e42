"""Bit-for-bit checks and timings of the Mosaic GPU ops on rows: the norms and log_normalizer.

    python scripts/check_gpu_rows.py --json h100-rows.json
    python scripts/check_gpu_rows.py --skip-times

Checks, on fixed normal inputs:

- rows: a batch of every size, its rows drawn from other places of the largest batch, gives each
  row the bits it has there; twice, and once among neighbours of NaN.
- schedules: every schedule of rms_norm gives the bits of the default one.
- oracle: distance to float64; the sum with the residual has the bits of numpy's; argmax is
  numpy's.
- experts: expert_norm gives the bits of rms_norm after `portable`'s expert_sum.
- edges: NaN, infinities, ties and rows without a finite logit.

Then device times (CUPTI, median) of ours and plain XLA, and the floor: bytes over the measured
copy rate. Inputs over 8 MB are rotated, so that L2 does not serve them (`cold`).

It reports every mismatch and exits with 1 if there is one. `sha256` hashes the largest batches:
equal hashes on another card or jax version mean that no bit moved.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

EVERY_M = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4096)
SOME_M = (1, 2, 9, 17, 64, 257, 1000, 4096)
# A width whose rows share no block sees the batch in its grid alone.
NORMS = (
    (576, 4096, EVERY_M, "bfloat16"),
    (4096, 4096, SOME_M, "bfloat16"),
    (128, 100_000, EVERY_M, "bfloat16"),
    (64, 4096, SOME_M, "bfloat16"),
    (640, 4096, EVERY_M, "float32"),  # as Gemma's
    (2560, 4096, SOME_M, "float32"),
)
NORM_TIMES = (
    *((4096, m, True) for m in (1, 8, 64, 256, 4096, 16384)),
    *((576, m, True) for m in (1, 64, 4096)),
    *((128, m, False) for m in (8, 32, 2560, 100_000, 1_000_000)),
)
EXPERT_TOKENS = (1, 2, 3, 8, 9, 33, 257, 1000)
VOCABULARIES = (49152, 151936, 1000)
BATCHES = (*range(1, 10), 33, 64, 256)
LOGIT_TIMES = (*((151936, m) for m in (1, 8, 32, 64, 256)), (49152, 1), (49152, 64))
EPS = 1e-5
COLD = 8e6


def bits(x: Any) -> Any:
    """The elements of an array as integers, on the host."""
    import numpy as np

    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


class Report:
    """Cases, mismatches and hashes, collected."""

    def __init__(self) -> None:
        self.cases, self.failures, self.sha256 = {}, [], {}

    def check(self, name: str, case: str, good: bool) -> None:
        """Count a case; keep it if it failed."""
        self.cases[name] = self.cases.get(name, 0) + 1
        if not good:
            self.failures.append([name, case])
            print("FAIL", name, case, flush=True)

    def check_bits(self, name: str, case: str, actual: Any, expected: Any) -> None:
        """Compare tuples of arrays by their integers; say how many rows differ."""
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            a, e = bits(a), bits(e)
            wrong = (a != e).reshape(len(e), -1).any(1).sum()
            self.check(name, f"{case} output {i}: {wrong} of {len(e)} rows", wrong == 0)

    def hash(self, name: str, arrays: Any) -> None:
        """Remember the hash of some results."""
        self.sha256[name] = hashlib.sha256(b"".join(bits(a).tobytes() for a in arrays)).hexdigest()


def check_rows(report: Report, name: str, f: Any, inputs: Any, whole: Any, batches: Any) -> None:
    """f(*inputs) of every batch against `whole`, that of the largest."""
    import jax
    import numpy as np

    largest = len(inputs[0])
    whole = [np.asarray(w) for w in whole]
    for m in batches:
        pick = (np.arange(m) + 37 * m + 11) % largest
        program = jax.jit(lambda *arrays: f(*arrays))
        batch = [jax.device_put(x[pick]) for x in inputs]
        expected = [w[pick] for w in whole]
        for run in ("first run", "second run"):
            report.check_bits(name, f"M={m} {run}", program(*batch), expected)
        row = m // 2
        among = [np.full_like(x[pick], np.nan) for x in inputs]
        for a, x in zip(among, inputs, strict=True):
            a[row] = x[pick[row]]
        alone = [y[row : row + 1] for y in program(*among)]
        report.check_bits(name, f"M={m} among NaN", alone, [e[row : row + 1] for e in expected])


def check_norm(report: Report, dim: int, largest: int, batches: Any, weights: str) -> None:
    """rms_norm of one width in bfloat16, with and without a residual."""
    import jax
    import ml_dtypes
    import numpy as np

    from jdet.pallas_kernels.rms_norm import mosaic_gpu

    rng = np.random.default_rng(dim)
    x, r = (
        rng.standard_normal((largest, dim), np.float32).astype(ml_dtypes.bfloat16) for _ in "xr"
    )
    weight = rng.standard_normal(dim, np.float32).astype(np.dtype(weights))
    on_device = jax.device_put(weight)
    norm = mosaic_gpu.rms_norm

    def both(x, r, schedule=None):
        y, s = norm(x, on_device, eps=EPS, residual=r, schedule=schedule)
        return y, s, norm(x, on_device, eps=EPS, schedule=schedule)[0]

    name = f"rms_norm D={dim}" + (f" weights {weights}" if weights != "bfloat16" else "")
    whole = [np.asarray(w) for w in jax.jit(both)(x, r)]
    report.hash(name, whole)
    s = (x.astype(np.float32) + r.astype(np.float32)).astype(ml_dtypes.bfloat16)
    report.check_bits(f"{name} oracle", "sum", [whole[1]], [s])
    for case, y, v in (("with residual", whole[0], s), ("without", whole[2], x)):
        v = v.astype(np.float64)
        want = v / np.sqrt((v**2).mean(-1, keepdims=True) + EPS) * weight.astype(np.float64)
        error = np.abs(y.astype(np.float64) - want)
        # Half of the last place, and float32's own share.
        good = (error <= (2**-8 + 2e-6) * np.abs(want)).all()
        report.check(f"{name} oracle", f"{case}, largest error {error.max():.2e}", bool(good))
    check_rows(report, f"{name} rows", both, (x, r), whole, batches)
    for m in (1, 17, 1000, largest):
        for schedule in mosaic_gpu.schedules(m, dim):
            y = jax.jit(lambda x, r, s=schedule: both(x, r, s))(x[:m], r[:m])
            report.check_bits(f"{name} schedules", f"M={m} {schedule}", y, [w[:m] for w in whole])


def check_experts(report: Report, dim: int) -> None:
    """expert_norm of one width, 8 experts a token, in bfloat16 and float32."""
    import jax
    import numpy as np

    import jdet
    from jdet.pallas_kernels.expert_norm import mosaic_gpu
    from jdet.pallas_kernels.expert_sum import portable
    from jdet.pallas_kernels.rms_norm.mosaic_gpu import rms_norm

    @jdet.jit
    def apart(y, weights, places, weight, residual):
        total = portable.expert_sum(y, weights, places)
        return rms_norm(total, weight, eps=EPS, residual=residual)

    @jdet.jit
    def whole(*arguments):
        return mosaic_gpu.expert_norm(*arguments, eps=EPS)

    name = f"expert_norm D={dim}"
    for dtype in ("bfloat16", "float32"):
        for m in EXPERT_TOKENS:
            rng = np.random.default_rng([dim, m])
            y, residual, weight = (
                rng.standard_normal(shape, np.float32).astype(jax.numpy.dtype(dtype))
                for shape in ((8 * m, dim), (m, dim), (dim,))
            )
            y[::31] = np.nan
            y[5::31, ::3] *= 0
            places = rng.permutation(8 * m).astype(np.int32).reshape(m, 8)
            given = y, rng.random((m, 8), np.float32), places, weight, residual
            want = apart(*given)
            report.check_bits(f"{name} experts", f"M={m} {dtype}", whole(*given), want)
    report.hash(name, want)


def check_logits(report: Report, vocabulary: int) -> None:
    """log_normalizer of one vocabulary."""
    import jax
    import numpy as np

    from jdet.pallas_kernels.log_normalizer import mosaic_gpu

    name = f"log_normalizer V={vocabulary}"
    f = mosaic_gpu.log_normalizer
    rng = np.random.default_rng(vocabulary)
    x = 4 * rng.standard_normal((max(BATCHES), vocabulary), np.float32)
    whole = [np.asarray(w) for w in jax.jit(f)(x)]
    report.hash(name, whole)
    maximum, log_sum, argmax = whole
    want = x.astype(np.float64)
    want = np.log(np.exp(want - want.max(-1, keepdims=True)).sum(-1))
    report.check_bits(f"{name} oracle", "maximum", [maximum], [x.max(-1)])
    report.check(f"{name} oracle", "argmax", bool((argmax == x.argmax(-1)).all()))
    error = np.abs(log_sum - want).max()
    report.check(f"{name} oracle", f"log_sum, largest error {error:.2e}", bool(error < 2e-6))
    check_rows(report, f"{name} rows", f, (x,), whole, BATCHES)

    # A maximum, or a NaN, at every kind of place; with an equal one at the end of the row.
    places = sorted({0, 1, 31, 32, 127, 128, 1023, 1024, 4095, 4096, vocabulary - 4097})
    places += [vocabulary - 1025, vocabulary - 1024, vocabulary - 1]
    places = [p for p in places if 0 <= p < vocabulary]
    for case, value in (("ties", 100.0), ("NaN", np.nan), ("infinity", np.inf)):
        edge = x[: len(places)].copy()
        edge[np.arange(len(places)), places] = value
        edge[:, -1] = value
        y = jax.jit(f)(edge)
        good = (np.asarray(y.argmax) == places).all()
        if case != "ties":
            good = good and np.isnan(np.asarray(y.log_sum)).all()
        report.check(f"{name} edges", case, bool(good))
    empty = np.full((3, vocabulary), -np.inf, np.float32)
    empty[0, vocabulary // 2], empty[1, -1] = 3.0, -3.0
    y = [np.asarray(v) for v in jax.jit(f)(empty)]
    good = (y[0] == [3, -3, -np.inf]).all() and (y[1][:2] == 0).all()
    good = good and (y[2] == [vocabulary // 2, vocabulary - 1, 0]).all()
    report.check(f"{name} edges", "no finite logit in most chunks", bool(good))


def time_both(make: Any, inputs: Any, nbytes: float, rate: float) -> dict[str, Any]:
    """Microseconds of make('mosaic_gpu') and make('xla'), the floor, and ratios."""
    import jax
    import timing  # pyright: ignore[reportMissingImports]

    cold = nbytes > COLD
    copies = timing.copies_for(nbytes) if cold else 1
    sets = [jax.block_until_ready(inputs(i)) for i in range(copies)]
    found = {}
    for name in ("mosaic_gpu", "xla"):
        f = make(name)
        program = jax.jit(lambda sets, f=f: [f(*s) for s in sets])
        found[name] = timing.device_us(program, sets) / copies
    floor = nbytes / rate * 1e6
    return {
        "cold": cold,
        "ours_us": round(found["mosaic_gpu"], 2),
        "xla_us": round(found["xla"], 2),
        "floor_us": round(floor, 2),
        "ours_to_xla": round(found["mosaic_gpu"] / found["xla"], 3),
        "floor_to_ours": round(floor / found["mosaic_gpu"], 3),
    }


def times(rate: float) -> list[dict[str, Any]]:
    """The table of times."""
    import jax
    import jax.numpy as jnp

    from jdet.pallas_kernels import implementation_of

    rows = []
    for dim, m, residual in NORM_TIMES:

        def make(name, residual=residual):
            norm = implementation_of("rms_norm", name)
            if residual:
                return lambda x, r, w: norm(x, w, eps=EPS, residual=r)
            return lambda x, w: norm(x, w, eps=EPS)[0]

        def inputs(i, dim=dim, m=m, residual=residual):
            keys = jax.random.split(jax.random.key(i), 2 + residual)
            made = [jax.random.normal(k, (m, dim), jnp.bfloat16) for k in keys[1:]]
            return (*made, jax.random.normal(keys[0], (dim,), jnp.bfloat16))

        nbytes = 2 * m * dim * (4 if residual else 2)
        case = {"op": "rms_norm", "D": dim, "M": m, "residual": residual}
        rows.append({**case, **time_both(make, inputs, nbytes, rate)})
        print(rows[-1], flush=True)
    for vocabulary, m in LOGIT_TIMES:

        def logits(i, vocabulary=vocabulary, m=m):
            return (4 * jax.random.normal(jax.random.key(i), (m, vocabulary), jnp.float32),)

        case = {"op": "log_normalizer", "V": vocabulary, "M": m}
        made = time_both(
            lambda name: implementation_of("log_normalizer", name),
            logits,
            4.0 * m * vocabulary,
            rate,
        )
        rows.append({**case, **made})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-times", action="store_true")
    parser.add_argument("--skip-bits", action="store_true")
    parser.add_argument("--experts", action="store_true", help="the section experts alone")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import timing  # pyright: ignore[reportMissingImports]

    start = time.perf_counter()
    report = Report()
    if not args.skip_bits:
        for dim in (2048, 4096, 1032):
            check_experts(report, dim)
        print(f"expert_norm: {time.perf_counter() - start:.0f} s", flush=True)
    if not args.skip_bits and not args.experts:
        for norm in NORMS:
            check_norm(report, *norm)
            print(f"rms_norm D={norm[0]}: {time.perf_counter() - start:.0f} s", flush=True)
        for vocabulary in VOCABULARIES:
            check_logits(report, vocabulary)
            print(f"log_normalizer V={vocabulary}: {time.perf_counter() - start:.0f} s", flush=True)
    rate = 0.0 if args.skip_times else timing.copy_rate()
    table = [] if args.skip_times else times(rate)
    out = {
        **timing.environment(),
        "seconds": round(time.perf_counter() - start),
        "failures": report.failures,
        "cases": report.cases,
        "sha256": report.sha256,
        "copy_tb_s": round(rate / 1e12, 3),
        "times": table,
    }
    print(f"{len(report.failures)} failures of {sum(report.cases.values())} cases", out["device"])
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
