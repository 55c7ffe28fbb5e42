"""G9: the same requests in a second process, which loads and compiles everything again.

`python -m jdet.certify.second_process` reads a job as JSON and prints log-probs as JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from jdet.certify.cases import Sent


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How another process makes the same model.

    Attributes:
      model: what `jdet.load` takes; or, if `random`, a published shape for `jdet.random_model`.
      layers: of a shape, so many; None: all.
    """

    model: str
    random: bool
    dtype: str
    implementation: str | None
    layers: int | None = None

    def make(self) -> Any:
        """The model."""
        import jdet
        from jdet.models.config import CONFIGS

        options: dict[str, Any] = {"dtype": self.dtype, "implementation": self.implementation}
        if not self.random:
            return jdet.load(self.model, **options)
        if self.layers is None:
            return jdet.random_model(self.model, **options)
        config = dataclasses.replace(CONFIGS[self.model], num_hidden_layers=self.layers)
        return jdet.random_model(config, **options)


def check_shape(name: str, layers: int | None) -> None:
    """Raise unless there is a published shape of that name, with so many layers.

    Raises:
      ValueError: there is none, or it has fewer.
    """
    from jdet.models.config import CONFIGS

    if name not in CONFIGS:
        raise ValueError(f"unknown shape {name!r}; allowed: {', '.join(CONFIGS)}")
    most = CONFIGS[name].num_hidden_layers
    if layers is not None and not 1 <= layers <= most:
        raise ValueError(f"layers={layers}; allowed: 1 to {most}, as {name} has")


class SecondProcess:
    """A child that runs requests alone; on CPU it has one core. Use it as a context manager."""

    def __init__(self, recipe: Recipe, requests: Sequence[Sent], batch: int) -> None:
        import jax

        self.requests = tuple(requests)
        self._said: IO[str] = tempfile.TemporaryFile("w+")
        self._errors: IO[str] = tempfile.TemporaryFile("w+")
        # The first process may hold most of a GPU's memory; and what it compiled, or left in a
        # cache, is not to be used.
        own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "jdet.certify.second_process"],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._errors,
            env={**os.environ, **own},
            text=True,
        )
        job = {
            "recipe": dataclasses.asdict(recipe),
            "requests": [r.to_json() for r in requests],
            "batch": batch,
            "one_core": jax.default_backend() == "cpu",
        }
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(job))
            self._child.stdin.close()
        except BrokenPipeError:
            pass  # it ended at once; `results` tells why

    def __enter__(self) -> "SecondProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        self._said.close()
        self._errors.close()

    def results(self, seconds: float) -> list[dict[str, Any]] | str:
        """Token ids and log-prob bits of each request; or why there are none."""
        try:
            status = self._child.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return "the second process was not done in the time; give more minutes"
        if status:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            return f"the second process failed with status {status}: {last}"
        self._said.seek(0)
        return json.loads(self._said.read().splitlines()[-1])


def bits_of(token_ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any]:
    """A completion as plain values; log-probs by their bits."""
    return {"token_ids": list(token_ids), "logprobs": np.array(logprobs, "<f4").tobytes().hex()}


def main() -> None:
    """Run a job from stdin."""
    job = json.load(sys.stdin)
    if job["one_core"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from jdet.certify.runs import Bench

    bench = Bench(Recipe(**job["recipe"]).make(), job["batch"])
    sent = [Sent.from_json(data) for data in job["requests"]]
    runs = [bench.alone(s.prompt, s.sampling) for s in sent]
    print(json.dumps([bits_of(c.token_ids, c.logprobs) for c in runs]))


if __name__ == "__main__":
    main()
