"""Runs a batch, is killed at random moments, and goes on.

One process that forks for each run, so that modules are imported once; it uses no device itself.
Arguments: "pretended" or "real" (the engine), input, output, number of kills, seed. Prints how
many results lay in the output at each kill that found its run alive.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jdet
from jdet.batch.runner import BatchRunner
from jdet.completion import Completion
from jdet.engine.config import EngineConfig
from jdet.engine.engine import Engine
from jdet.models.config import DecoderConfig
from jdet.sampling import SamplingParams
from jdet.testing import tiny_config

# Few programs: the first run compiles them all.
_CONFIG = EngineConfig(
    max_batch_size=4,
    max_tokens_per_step=20,
    max_model_len=256,
    num_pages=8,
    chunk_sizes=(16,),
    chunk_rows=(1,),
    decode_rows=(4,),
)


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


def run(engine_name: str, source: Path, target: Path) -> None:
    engine: Any = Pretended()
    if engine_name == "real":
        config = DecoderConfig.from_hf(tiny_config())
        model = jdet.random_model(config, dtype="bfloat16", implementation="portable")
        engine = Engine(model, _CONFIG)
    BatchRunner(engine, "tiny", "bfloat16").run(source, target, progress=False)


def results(target: Path) -> int:
    partial = target.with_name(target.name + ".partial")
    return partial.read_bytes().count(b"\n") if partial.exists() else 0


def wait(engine_name: str, target: Path, child: int, rng: random.Random) -> None:
    """Until a random moment; a real engine must have written some results more."""
    if engine_name == "pretended":
        time.sleep(rng.uniform(0.0, 0.04))
        return
    wanted = results(target) + rng.randint(1, 6)
    while results(target) < wanted and os.waitid(os.P_PID, child, _STILL_THERE) is None:
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.02))


_STILL_THERE = os.WEXITED | os.WNOHANG | os.WNOWAIT


def main(engine_name: str, source: str, target: str, kills: str, seed: str) -> None:
    rng, found = random.Random(int(seed)), []
    for attempt in range(int(kills) + 1):
        child = os.fork()
        if child == 0:
            run(engine_name, Path(source), Path(target))
            os._exit(0)
        if attempt < int(kills):
            wait(engine_name, Path(target), child, rng)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            found.append(results(Path(target)))
        else:
            assert os.WEXITSTATUS(status) == 0
    print(*found)


if __name__ == "__main__":
    main(*sys.argv[1:])
