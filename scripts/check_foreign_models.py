"""Other people's models, as published and under `jdet.batch_invariant`: bits and times.

    make .venv-models/.jdet-env
    .venv-models/bin/python scripts/check_foreign_models.py --json foreign.json
    python scripts/check_foreign_models.py --models tunix_qwen3 --sizes large --dtypes bfloat16 \
      --json h100-foreign.json

The models are the modules of scripts/foreign_models, with random weights. Every request is run
alone; then batches of every size are drawn: rows, places and neighbours at random, garbage in the
padding, in some half of the rows extreme values. Of each row, all outputs are compared bit for bit
with the request's alone. Then the same with other amounts of padding. The plain model is the
negative control: its row says how many of the batch sizes moved a bit, and where none did, that
the row proves nothing.

The difference between the two is given in units of the dtype's rounding of the largest output;
beside it the plain model's own, between batch sizes. Times are medians of alternate runs of the
two, and compile times of alternate compiles, tracing included, each from empty caches; what a
process pays once (importing Pallas above all) is in `warm_up_seconds` in their place.

Exit status 1 if an invariant row moved, if no plain row of any model did, or if a model failed.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import jax
import jax.numpy as jnp
import numpy as np
from foreign_models.example import Example
from timing import environment  # pyright: ignore[reportMissingImports]

import jdet

MODELS = sorted(
    path.stem
    for path in (Path(__file__).parent / "foreign_models").glob("*.py")
    if path.stem != "example"
)
BATCHES = (1, 2, 3, 5, 8, 16, 33, 64)
PADDED_BATCHES = (1, 3, 8)
POOL = 12
KINDS = ("plain", "invariant")


def take(requests: Any, which: np.ndarray) -> Any:
    return jax.tree.map(lambda a: a[which], requests)


def mixed(requests: Any, extremes: Any, at: np.ndarray) -> Any:
    """Requests, but extreme ones at the places `at`."""

    def put(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a = a.copy()
        a[at] = b
        return a

    return jax.tree.map(put, requests, extremes)


class Rows:
    """What one program made of requests: of each, the bits alone and in every company.

    Attributes:
      compared: rows compared with the request alone, by batch size.
      moved: of these, the rows with other bits, by batch size.
      patterns: of each request, the bit patterns seen.
      largest: the largest difference to the request alone.
    """

    def __init__(self, example: Example, program: Any) -> None:
        self.example, self.program = example, program
        self.compared: dict[Any, int] = defaultdict(int)
        self.moved: dict[Any, int] = defaultdict(int)
        self.patterns: dict[int, set[bytes]] = defaultdict(set)
        self.largest = 0.0
        self.alone: dict[int, np.ndarray] = {}

    def outputs(self, requests: Any, pad: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The real part of every row."""
        batch = self.example.batch(requests, pad, rng)
        found = np.asarray(self.program(self.example.weights, batch))
        return [self.example.real(row) for row in found]

    def run_alone(self, pool: Any, rng: np.random.Generator) -> None:
        for i in range(POOL):
            (self.alone[i],) = self.outputs(take(pool, np.array([i])), self.example.pads[0], rng)
            self.patterns[i].add(self.alone[i].tobytes())
        values = np.stack([a.astype(np.float64) for a in self.alone.values()])
        if not np.isfinite(values).all():
            raise ValueError("a request alone gives outputs that are not finite")

    def compare(self, key: Any, which: np.ndarray, skip: np.ndarray, rows: list[Any]) -> None:
        for place, (request, row) in enumerate(zip(which, rows, strict=True)):
            if place in skip:
                continue
            alone = self.alone[int(request)]
            self.compared[key] += 1
            self.patterns[int(request)].add(row.tobytes())
            if row.tobytes() != alone.tobytes():
                self.moved[key] += 1
                difference = np.abs(row.astype(np.float64) - alone.astype(np.float64)).max()
                self.largest = max(self.largest, float(difference))

    def summary(self) -> dict[str, Any]:
        """For the results."""
        pads = [key for key in self.compared if isinstance(key, tuple)]
        sizes = [key for key in self.compared if not isinstance(key, tuple) and key > 1]
        return {
            "rows": sum(self.compared.values()),
            "rows_moved": sum(self.moved.values()),
            "batch_sizes": sizes,
            "batch_sizes_moved": [key for key in sizes if self.moved[key]],
            "paddings": sorted({pad for _, pad in pads}),
            "paddings_moved": sorted({pad for size, pad in pads if self.moved[size, pad]}),
            "bit_patterns_of_a_request": max(map(len, self.patterns.values())),
            "largest_difference_to_alone": self.largest,
        }


def check(example: Example, sizes: list[int], draws: int) -> dict[str, Any]:
    """Both programs in the same companies."""
    source = np.random.default_rng(0)
    pool = example.requests(source, POOL)
    found = {kind: Rows(example, getattr(example, kind)) for kind in KINDS}
    for rows in found.values():
        rows.run_alone(pool, np.random.default_rng(1))
    companies: list[tuple[Any, int, int, bool]] = [
        (size, size, example.pads[0], extreme)
        for size in sizes
        for extreme in (False, True)
        for _ in range(draws)
        if size > 1 or not extreme
    ]
    companies += [
        ((size, pad), size, pad, False) for pad in example.pads[1:] for size in PADDED_BATCHES
    ]
    for key, size, pad, extreme in companies:
        which = source.permutation(np.resize(np.arange(POOL), size))
        if size < POOL:
            which = source.choice(POOL, size, replace=False)
        requests = take(pool, which)
        skip = np.zeros(0, int)
        if extreme:
            skip = source.choice(size, size // 2, replace=False)
            requests = mixed(requests, example.extremes(source, len(skip)), skip)
        garbage = int(source.integers(2**31))
        for rows in found.values():
            result = rows.outputs(requests, pad, np.random.default_rng(garbage))
            rows.compare(key, which, skip, result)
    return {kind: rows.summary() for kind, rows in found.items()} | {
        "difference": difference(found["plain"], found["invariant"])
    }


def difference(plain: Rows, invariant: Rows) -> dict[str, float]:
    """Between the two programs, of requests alone."""
    pairs = [
        (a.astype(np.float64), invariant.alone[i].astype(np.float64))
        for i, a in plain.alone.items()
    ]
    largest = max(float(np.abs(a).max()) for a, _ in pairs)
    apart = max(float(np.abs(a - b).max()) for a, b in pairs)
    return {"largest_output": largest, "largest_difference": apart}


def seconds(f: Callable[..., Any], *args: Any, least: float = 0.3) -> float:
    """The mean time of a call, over as many as take `least` seconds."""
    jax.block_until_ready(f(*args))
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < least:
        jax.block_until_ready(f(*args))
        count += 1
    return (time.perf_counter() - start) / count


def warm_up() -> float:
    """The time of a first small program of each kind."""
    start = time.perf_counter()
    x = jnp.ones((8, 128), jnp.bfloat16)

    def f(x: jax.Array) -> jax.Array:
        return jnp.sum(x @ x.T, -1)

    jax.block_until_ready([jax.jit(g)(x) for g in (f, jdet.batch_invariant(f))])
    return time.perf_counter() - start


def compiled_in_parts(program: Any, *args: Any) -> tuple[Any, list[float]]:
    """A compiled program, and the seconds of tracing, of lowering and of XLA."""
    times = [time.perf_counter()]
    for step in (lambda p: p.trace(*args), lambda p: p.lower(), lambda p: p.compile()):
        program = step(program)
        times.append(time.perf_counter())
    return program, [b - a for a, b in itertools.pairwise(times)]


def measure(example: Example, repeats: int, compile_repeats: int) -> list[dict[str, Any]]:
    """Run and compile times of both programs, by batch size."""
    found = []
    once = warm_up()
    for size in example.timed:
        rng = np.random.default_rng(2)
        batch = example.batch(example.requests(rng, size), example.pads[0], rng)
        batch = jax.device_put(batch) if not isinstance(batch, jax.Array) else batch
        parts: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
        runs: dict[str, list[float]] = {kind: [] for kind in KINDS}
        compiled = {}
        for _ in range(compile_repeats):
            for kind in KINDS:
                jax.clear_caches()
                program = getattr(example, kind)
                compiled[kind], seconds_of = compiled_in_parts(program, example.weights, batch)
                parts[kind].append(seconds_of)
        for _ in range(repeats):
            for kind in KINDS:
                runs[kind].append(seconds(compiled[kind], example.weights, batch))
        compiles = {kind: [sum(of) for of in parts[kind]] for kind in KINDS}
        middle = {
            name: {kind: statistics.median(values[kind]) for kind in KINDS}
            for name, values in (("run", runs), ("compile", compiles))
        }
        found.append(
            {"batch": size, "run_seconds": runs, "compile_seconds": compiles}
            | {"trace_lower_compile_seconds": parts, "warm_up_seconds": once}
            | {
                f"{name}_ratio": values["invariant"] / values["plain"]
                for name, values in middle.items()
            }
        )
    return found


def row_of(name: str, size: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model in one size and dtype."""
    start = time.perf_counter()
    row: dict[str, Any] = {"model": name, "size": size, "dtype": dtype}
    try:
        module = importlib.import_module(f"foreign_models.{name}")
        version = importlib.metadata.version(module.PACKAGE)
        example: Example = module.build(size, dtype, **args.options)
        row |= {"package": f"{module.PACKAGE} {version}", "config": example.about}
        if "bits" in args.parts:
            row |= check(example, args.batches, args.draws)
            unit = float(jnp.finfo(dtype).eps) * row["difference"]["largest_output"]
            row["difference"]["in_roundings"] = row["difference"]["largest_difference"] / unit
            row["difference"]["plain_between_batches_in_roundings"] = (
                row["plain"]["largest_difference_to_alone"] / unit
            )
        if "times" in args.parts:
            row["times"] = measure(example, args.repeats, args.compiles or args.repeats)
    except Exception as error:  # the other rows are worth their time
        row["error"] = f"{type(error).__name__}: {error}"
        if args.stop:
            raise
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    line = f"{row['model']:<20}{row['size']:<6}{row['dtype']:<9}"
    if "invariant" in row:
        for kind in KINDS:
            r = row[kind]
            line += f" {kind} moved {r['rows_moved']}/{r['rows']} at {r['batch_sizes_moved']}"
            line += f" pads {r['paddings_moved']}" if r["paddings"] else ""
        line += f"; apart by {row['difference']['in_roundings']:.2f} roundings"
        line += "" if row["plain"]["rows_moved"] else "; NO CONTROL: the plain model did not move"
    for at in row.get("times", ()):
        line += f"; B={at['batch']} run {at['run_ratio']:.2f}x compile {at['compile_ratio']:.2f}x"
    print(f"{line} {row.get('error', '')}".rstrip(), flush=True)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.models:
        for size in args.sizes:
            for dtype in args.dtypes:
                row = row_of(name, size, dtype, args)
                jax.clear_caches()
                show(row)
                yield row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])

    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--models", type=words, default=MODELS, help="a,b,...")
    parser.add_argument("--sizes", type=words, default=["tiny", "real"], help="tiny, real, ...")
    parser.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    parser.add_argument("--parts", type=words, default=["bits", "times"])
    parser.add_argument("--batches", type=numbers, default=list(BATCHES))
    parser.add_argument("--draws", type=int, default=2, help="batches of a size")
    parser.add_argument("--repeats", type=int, default=3, help="of a time")
    parser.add_argument("--compiles", type=int, help="of a compile time, where they are fewer")
    parser.add_argument("--options", type=json.loads, default={}, help="of batch_invariant, JSON")
    parser.add_argument("--stop", action="store_true", help="at the first error, with its trace")
    args = parser.parse_args()
    for given, allowed in ((args.models, MODELS), (args.parts, ["bits", "times"])):
        if unknown := set(given) - set(allowed):
            parser.error(f"{', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
    return args


def main() -> int:
    args = arguments()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    start = time.perf_counter()
    found = list(rows(args))
    checked = [row for row in found if "invariant" in row]
    moved = sum(row["invariant"]["rows_moved"] for row in checked)
    control = sum(bool(row["plain"]["rows_moved"]) for row in checked)
    counts = {
        "rows of the table": len(found),
        "failed": sum("error" in row for row in found),
        "invariant rows moved": moved,
        "plain models that moved": control,
        "plain models compared": len(checked),
    }
    print(counts)
    result = {**environment(), "counts": counts, "rows": found}
    result["seconds"] = round(time.perf_counter() - start, 1)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(counts["failed"]) or moved > 0 or (bool(checked) and control == 0))


if __name__ == "__main__":
    sys.exit(main())
