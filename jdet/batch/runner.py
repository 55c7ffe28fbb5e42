"""A batch: lines in, results out in the same order, through an engine that is kept full."""

import collections
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jdet.batch import body
from jdet.batch.lines import BatchRequest, Line, parse, read_lines, request_of
from jdet.batch.output import Output
from jdet.engine.engine import Engine
from jdet.engine.handle import Handle

# Lines that are read ahead of the first one whose result is not written yet.
_WINDOW = 16


@dataclasses.dataclass
class _Entry:
    """A line on its way: its handle, or its result where there is nothing to compute."""

    line: Line
    name: str
    custom_id: str | None = None
    chat: bool = False
    handle: Handle | None = None
    result: dict[str, Any] | None = None

    @property
    def done(self) -> bool:
        return self.handle is None or self.handle.done


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did: results written by it, found from an earlier run, and failed lines."""

    written: int
    found: int
    failed: int


class BatchRunner:
    """Runs files of requests on an engine.

    A result depends on its line, the model and `model_name` alone: neither on the other lines
    nor on their order.

    Args:
      engine: to be used by nobody else meanwhile.
      model_name: goes into the results.
      dtype: of the model; it and all else that decides the bits goes into the results' ids,
        so that a run is not continued with another model.
    """

    def __init__(self, engine: Engine, model_name: str, dtype: str) -> None:
        self._engine = engine
        self._model_name = model_name
        identity = [model_name, dtype, engine.model.ops.fingerprint]
        self._identity = json.dumps(identity).encode()

    def run(
        self,
        source: Path,
        target: Path,
        *,
        shard: tuple[int, int] = (0, 1),
        progress: bool | None = None,
    ) -> Summary:
        """Write a result for each line of `source` to `target`, or go on where a run ended.

        Args:
          shard: (i, n): of every n lines the one with index i alone.
          progress: a progress bar; None: where stderr is a terminal.

        Raises:
          ValueError: `target`, or what an earlier run left of it, has results of other lines
            or of another model.
          OSError: a file cannot be read or written.
        """
        disable = None if progress is None else not progress
        size = source.stat().st_size
        with (
            open(source, "rb") as file,
            tqdm(total=size, unit="B", unit_scale=True, disable=disable) as bar,
        ):
            lines = itertools.islice(read_lines(file), shard[0], None, shard[1])
            if target.exists():
                return self._check_complete(lines, target)
            with Output(target) as output:
                return self._run(lines, output, bar)

    def _run(self, lines: Iterator[Line], output: Output, bar: tqdm) -> Summary:
        for done in output.done_before():
            line = next(lines, None)
            if line is None:
                raise ValueError(f"{output.partial} has more results than there are lines")
            self._check(done, line, output.partial)
            bar.update(line.end - bar.n)
        found, failed, start = output.written, 0, time.perf_counter()
        for ready in self.results(lines):
            output.append([result for _, result in ready])
            failed += sum(result["error"] is not None for _, result in ready)
            bar.update(ready[-1][0].end - bar.n if ready else 0)
            counts, seconds = self._engine.counts, time.perf_counter() - start
            bar.set_postfix_str(
                f"{output.written} lines, prefill {counts.prompt_tokens / seconds:.0f} tok/s, "
                f"decode {counts.decode_tokens / seconds:.0f} tok/s"
            )
        output.complete()
        return Summary(output.written - found, found, failed)

    def results(self, lines: Iterator[Line]) -> Iterator[list[tuple[Line, dict[str, Any]]]]:
        """After each step what it has finished: lines with their results, in input order."""
        window: collections.deque[_Entry] = collections.deque()
        limit = _WINDOW * self._engine.config.max_batch_size
        more = True
        while more or window:
            while more and len(window) < limit:
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    window.append(self._begin(line))
            if self._engine.busy:
                self._engine.step()
            ready = []
            while window and window[0].done:
                entry = window.popleft()
                ready.append((entry.line, self._result(entry)))
            yield ready

    def _check_complete(self, lines: Iterator[Line], target: Path) -> Summary:
        count = 0
        with open(target, "rb") as file:
            for count, line in enumerate(lines, 1):  # noqa: B007
                self._check(json.loads(file.readline() or b"{}"), line, target)
            if file.readline():
                raise ValueError(f"{target} has more results than there are lines")
        return Summary(0, count, 0)

    def _check(self, result: dict[str, Any], line: Line, path: Path) -> None:
        if result.get("id") != f"batch_req_{self._name(line)}":
            raise ValueError(
                f"{path} is of another input or model (line {line.number}); "
                "remove it, or write to another file"
            )

    def _name(self, line: Line) -> str:
        return hashlib.sha256(self._identity + line.digest).hexdigest()[:24]

    def _begin(self, line: Line) -> _Entry:
        entry = _Entry(line, self._name(line))
        try:
            entry.custom_id, value = parse(line)
            request = request_of(value, line.digest)
            entry.chat = request.messages is not None
            entry.handle = self._engine.submit(self._prompt(request), request.sampling, "prompt")
        except ValueError as error:
            entry.result = body.failure(entry.name, entry.custom_id, str(error))
        return entry

    def _prompt(self, request: BatchRequest) -> str | list[int]:
        if request.prompt is not None:
            return request.prompt
        tokenizer = self._engine.model.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise ValueError("the model has no chat template; give a prompt")
        return tokenizer.chat_prompt(request.messages)

    def _result(self, entry: _Entry) -> dict[str, Any]:
        if entry.handle is None:
            assert entry.result is not None
            return entry.result
        return body.success(
            entry.name,
            entry.custom_id,
            self._model_name,
            self._engine.completions(entry.handle),
            self._engine.model.tokenizer,
            chat=entry.chat,
        )
