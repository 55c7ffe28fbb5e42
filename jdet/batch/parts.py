"""One output of many: a part for each worker, merged into the order of the input."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jdet.batch.output import Output

_AT_ONCE = 256


def part(target: Path, worker: int, workers: int) -> Path:
    """Where a worker writes the results of its lines: `worker`, `worker + workers`, ..."""
    return target.with_name(f"{target.name}.part-{worker:04d}-of-{workers:04d}")


def check_parts(target: Path, workers: int) -> None:
    """Refuse to go on with what another number of workers has begun.

    Raises:
      ValueError: a part of another number of workers is there.
    """
    for path in sorted(target.parent.glob(f"{target.name}.part-*")):
        if f"-of-{workers:04d}" not in path.name:
            raise ValueError(
                f"{path} is of a run with another number of workers than {workers}; "
                "remove its parts, or run with as many as before"
            )


def wait_for(paths: Sequence[Path], seconds: float = 1.0) -> None:
    """Until all the files are there."""
    while not all(path.exists() for path in paths):
        time.sleep(seconds)


def merge(parts: Sequence[Path], target: Path) -> int:
    """Write the lines of the parts, one of each in turn, to `target`; how many they are.

    Killed and started again it goes on where it ended.

    Raises:
      ValueError: the parts do not follow from one input.
    """
    with Output(target) as output:
        done = sum(1 for _ in output.done_before())
        lines = itertools.islice(_in_turn(parts), done, None)
        while some := [json.loads(line) for line in itertools.islice(lines, _AT_ONCE)]:
            output.append(some)
        output.complete()
        return output.written


def _in_turn(parts: Sequence[Path]) -> Iterator[bytes]:
    files: list[Any] = [open(path, "rb") for path in parts]
    try:
        for number in itertools.count():
            line = files[number % len(files)].readline()
            if not line:
                break
            yield line
        if any(file.readline() for file in files):
            raise ValueError(f"{parts[0]} and the other parts do not have the lines of one input")
    finally:
        for file in files:
            file.close()
