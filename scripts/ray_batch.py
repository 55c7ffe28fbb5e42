"""`jdet run-batch` over the hosts of a Ray cluster: the same bytes, whatever their number.

    python scripts/ray_batch.py -i in.jsonl -o out.jsonl --workers 4 --gpus-per-worker 1

Each worker is an actor with an engine of its own, and gets some lines at a time; the results
stand in input order. Lines pass through the memory of this process. What a lost worker had is
run again by Ray; if this process is killed, the job begins anew. Needs the extra `ray`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("ray_batch needs the extra: pip install 'jdet[ray]'") from error

from jdet.batch.lines import Line, read_lines
from jdet.batch.options import BatchOptions, add_arguments, options_of
from jdet.batch.output import Output


class RayBatch:
    """For `ray.data.Dataset.map_batches` with `batch_format="pyarrow"`: lines to results.

    Rows in: those of `rows_of`. Rows out, in the same order: `number`; `result`, as JSON; and
    `worker`, the actor's id. A result depends on its line and the model alone, not on the rows
    that come along.

    Args:
      options: of the worker's engine.
    """

    def __init__(self, options: BatchOptions) -> None:
        self._runner = options.runner()

    def __call__(self, rows: pa.Table) -> pa.Table:
        lines = (Line(r["number"], r["content"], r["digest"], 0) for r in rows.to_pylist())
        worker = ray.get_runtime_context().get_actor_id()
        done = [
            {"number": line.number, "result": json.dumps(result), "worker": worker}
            for ready in self._runner.results(lines)
            for line, result in ready
        ]
        return pa.Table.from_pylist(done)


def rows_of(source: Path) -> Iterator[dict[str, Any]]:
    """A row for each line: its number, its bytes (None: too many), their digest."""
    with open(source, "rb") as file:
        for line in read_lines(file):
            yield {"number": line.number, "content": line.content, "digest": line.digest}


def run(
    source: Path,
    target: Path,
    options: BatchOptions,
    *,
    workers: int,
    lines_per_call: int,
    resources: dict[str, float],
) -> tuple[int, int]:
    """Write a result for each line; (results, workers that gave some).

    Args:
      options: of the workers' engines.
      resources: of a worker, for `map_batches`.

    Raises:
      ValueError: `target` or what another run left of it is there already.
    """
    rows, found, used = list(rows_of(source)), 0, set()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    for path in (target, target.with_name(target.name + ".partial")):
        if path.exists():
            raise ValueError(f"{path} is there already; remove it, or write to another file")
    with Output(target) as output:
        if rows:
            calls = -(-len(rows) // lines_per_call)
            results = ray.data.from_items(rows, override_num_blocks=calls).map_batches(
                RayBatch,
                fn_constructor_kwargs={"options": options},
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
                **resources,
            )
            for part in results.iter_batches(batch_size=None, batch_format="pyarrow"):
                done = part.to_pylist()
                numbers = [row["number"] for row in rows[found : found + len(done)]]
                assert [row["number"] for row in done] == numbers, "Ray changed the order"
                output.append([json.loads(row["result"]) for row in done])
                used |= {row["worker"] for row in done}
                found += len(done)
        assert found == len(rows), f"{found} results for {len(rows)} lines"
        output.complete()
    return found, len(used)


def main() -> None:
    parser = argparse.ArgumentParser(description="jdet run-batch over a Ray cluster.")
    add_arguments(parser)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cpus-per-worker", type=float, default=1)
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    parser.add_argument("--lines-per-call", type=int, default=512)
    args = parser.parse_args()
    if args.workers < 1 or args.lines_per_call < 1:
        parser.error("--workers and --lines-per-call: integers from 1")
    options = options_of(parser, args)
    try:
        count, used = run(
            args.input,
            args.output,
            options,
            workers=args.workers,
            lines_per_call=args.lines_per_call,
            resources={"num_cpus": args.cpus_per_worker, "num_gpus": args.gpus_per_worker},
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.output}: {count} results by {used} workers", file=sys.stderr)


if __name__ == "__main__":
    main()
