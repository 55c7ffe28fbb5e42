"""Runs a batch on a pretended engine, is killed at random moments, and goes on.

One process that forks for each run, so that modules are imported once. No device is used.
Arguments: input, output, number of kills, seed. Prints how many runs were really killed.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jdet.batch.runner import BatchRunner
from jdet.completion import Completion
from jdet.sampling import SamplingParams


class Pretended:
    """An engine that answers with the prompt's ids reversed, in random order of completion."""

    config = SimpleNamespace(max_batch_size=2)
    model = SimpleNamespace(ops=SimpleNamespace(fingerprint="f"), tokenizer=None)
    counts = SimpleNamespace(prompt_tokens=0, decode_tokens=0)

    def __init__(self) -> None:
        self._running: list[SimpleNamespace] = []

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def submit(self, prompt: list[int], sampling: SamplingParams, name: str) -> SimpleNamespace:
        self._running.append(SimpleNamespace(prompt=prompt, seed=sampling.seed, done=False))
        return self._running[-1]

    def step(self) -> None:
        time.sleep(0.001)
        self._running.pop(random.randrange(len(self._running))).done = True

    def completions(self, handle: SimpleNamespace) -> list[Completion]:
        ids = handle.prompt[::-1]
        return [
            Completion(0, 0, handle.prompt, ids, "", [0.0] * len(ids), "stop", handle.seed, "f")
        ]


def run(source: Path, target: Path) -> None:
    engine: Any = Pretended()
    BatchRunner(engine, "pretended", "float32").run(source, target, progress=False)


def main(source: str, target: str, kills: str, seed: str) -> None:
    killed, rng = 0, random.Random(int(seed))
    for attempt in range(int(kills) + 1):
        child = os.fork()
        if child == 0:
            run(Path(source), Path(target))
            os._exit(0)
        if attempt < int(kills):
            time.sleep(rng.uniform(0.0, 0.04))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    print(killed)


if __name__ == "__main__":
    main(*sys.argv[1:])
