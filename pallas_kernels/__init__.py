"""The trees of jdet's ops and their schedules: one folder an op, one module an implementation.

`implementation_of("matmul", "portable")` imports `jdet.pallas_kernels.matmul.portable`
and returns its function `matmul`: the folders are the registry. Nothing here chooses
by batch shape, and nothing falls back to another implementation.

Implementations:

- `reference`: the tree written as plainly as possible, for reading and for oracles;
- `portable`: jnp on any backend, invariant; the CPU default;
- `xla`: plain XLA, **not** invariant: negative control and speed baseline;
- `mosaic_gpu`: Pallas Mosaic GPU kernels, invariant;
- `mosaic_tpu`: Pallas TPU kernels, invariant;
- `jax_triton`: Triton kernels (matmul alone so far), invariant; needs the extra `triton`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

OPS = (
    "attention",
    "embed",
    "expert_norm",
    "expert_sum",
    "gated_matmul",
    "gelu_mul",
    "grouped_gated_matmul",
    "grouped_matmul",
    "log_normalizer",
    "matmul",
    "qkv_heads",
    "rms_norm",
    "rope",
    "route",
    "silu_mul",
    "soft_cap",
)
IMPLEMENTATIONS = ("reference", "portable", "xla", "mosaic_gpu", "mosaic_tpu", "jax_triton")


def available(op: str) -> tuple[str, ...]:
    """The implementations of `op` that exist in this version, in `IMPLEMENTATIONS` order."""
    package = f"{__name__}.{op}"
    return tuple(name for name in IMPLEMENTATIONS if importlib.util.find_spec(f"{package}.{name}"))


def implementation_of(op: str, implementation: str) -> Callable[..., Any]:
    """The function that computes `op` in `implementation`.

    Raises:
      ValueError: `op` or `implementation` is not a name this library knows.
      NotImplementedError: the name is known and nobody has written that kernel yet.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; ops: {', '.join(OPS)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; allowed: {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation not in available(op):
        raise NotImplementedError(
            f"{op} has no {implementation!r} implementation yet; it has: {', '.join(available(op))}"
        )
    return getattr(importlib.import_module(f"{__name__}.{op}.{implementation}"), op)
