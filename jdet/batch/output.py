"""The output of a batch: results in input order, kept through a kill, complete or not there."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class Output:
    """Lines appended to PATH.partial, which becomes PATH once all of them are there.

    Every line is on the disk before the next step begins. A run that was killed leaves whole
    lines and perhaps the beginning of one, which `done_before` cuts off.

    Raises:
      ValueError: another run writes the same output.
      OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.written = 0

    def __enter__(self) -> "Output":
        # Unbuffered: what could not be written must not be tried again at close.
        self._file = open(self.partial, "ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{self.partial}: another run is writing it") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def done_before(self) -> Iterator[dict[str, Any]]:
        """The results of earlier runs. At its end what is left of a torn line is cut off."""
        end = 0
        with open(self.partial, "rb") as file:
            while (line := file.readline()).endswith(b"\n"):
                yield json.loads(line)
                self.written += 1
                end += len(line)
        self._file.truncate(end)

    def append(self, results: Sequence[dict[str, Any]]) -> None:
        """Write results and wait until the disk has them."""
        if not results:
            return
        text = "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in results)
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; {self.written} results are kept in {self.partial}, "
                "and the same command goes on from there",
            ) from None
        self.written += len(results)

    def complete(self) -> None:
        """Give the output its name."""
        os.replace(self.partial, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
