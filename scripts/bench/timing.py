"""Timing helpers of the GPU benchmarks: device time by CUPTI, cold L2, and the two ceilings.

Methods:

- `device_us`: the sum of the device times of the kernels that one call launches, by
  `jax.experimental.mosaic.gpu.profiler.measure` (CUPTI): gaps between launches and host time
  are not in it. Median over the iterations.
- `wall_us`: the host's clock around a call that is waited for; for chains inside one jit.
- Cold L2: the caller passes several sets of inputs, together larger than `COLD_BYTES`, and
  one call walks all of them (`copies_for`).
- `copy_rate`, `matrix_rate`: the two ceilings of this card, measured in the same run.
"""

import importlib.metadata
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROOT = Path(__file__).resolve().parents[2]
COLD_BYTES = 250e6  # five times the L2 of an H100


def copies_for(nbytes: float) -> int:
    """How many operands of `nbytes` bytes to rotate over, so that L2 serves none of them."""
    return max(1, -(-int(COLD_BYTES) // int(nbytes)))


def device_us(f: Callable[..., Any], *args: Any, iterations: int = 7) -> float:
    """Median device time of one call of `f`, in microseconds, over all kernels it launches."""
    from jax.experimental.mosaic.gpu import profiler

    # Not detached after each use: re-attaching fails after some tens of times.
    _, found = profiler.Cupti(finalize=False).measure(f, iterations=iterations)(*args)
    if found is None:
        raise RuntimeError("CUPTI reported no kernel")
    times: Any = found if isinstance(found, list) else [found]
    return statistics.median(times) * 1e3


def wall_us(f: Callable[..., Any], *args: Any, iterations: int = 20) -> float:
    """Median wall-clock time of one call of `f`, in microseconds."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def copy_rate(nbytes: float = 2e9) -> float:
    """Bytes a second, read plus written, of an elementwise pass over `nbytes` bytes."""
    x = jnp.ones((int(nbytes) // 4,), jnp.float32)
    us = device_us(jax.jit(lambda v: v + 1), x)
    return 2 * x.nbytes / us * 1e6


def matrix_rate(size: int = 8192) -> float:
    """Operations a second of plain XLA on one large bfloat16 product of random numbers."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    us = device_us(jax.jit(lambda p, q: lax.dot(p, q)), a, b)
    return 2 * size**3 / us * 1e6


def events_of(folder: str) -> list[Any]:
    """What the GPU's streams ran, kernels and copies, from a profiler trace."""
    path = next(Path(folder).rglob("*.xplane.pb"))
    return [
        event
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if "GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def environment() -> dict[str, Any]:
    """What a result needs beside its numbers."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    for plugin in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        try:
            versions[plugin] = importlib.metadata.version(plugin)
        except importlib.metadata.PackageNotFoundError:
            continue
    client = jax.devices()[0].client
    return {
        "device": jax.devices()[0].device_kind,
        "platform_version": getattr(client, "platform_version", "").split("\n")[0],
        "python": platform.python_version(),
        "versions": versions,
        "command": _command(),
    }


def _command() -> str:
    """What was run: the script from the repository's root, files elsewhere by their names."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    arguments = (re.sub(r"(^|=)/.*/", r"\1", a) for a in sys.argv[1:])
    return " ".join(["python", str(script), *arguments])
