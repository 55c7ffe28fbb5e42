"""The XLA options the promise needs: set per compile, reported, and defended.

Sources: what each option does and what was measured stands in README.md ("XLA options").
"""

import os
from collections.abc import Callable
from typing import Any

import jax

Option = str | bool | int

_COMMON: dict[str, Option] = {
    # With excess precision a bfloat16 rounding vanishes where XLA fuses producer and
    # consumer, and fusion follows shapes.
    "xla_allow_excess_precision": False,
}
_GPU: dict[str, Option] = {
    # Dots that are left to XLA (implementation `portable`) must not be autotuned: another
    # process may time another winner.
    "xla_gpu_exclude_nondeterministic_ops": True,
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_experimental_force_split_k": 1,
}

# Flags that break the promise whatever is set per compile, and the values that do.
_FORBIDDEN: dict[str, tuple[str, ...]] = {
    "xla_allow_excess_precision": ("true", "1", ""),
    "xla_cpu_enable_fast_math": ("true", "1", ""),
    # Without YNNPACK's dots XLA:CPU falls back to Eigen, whose sums follow the core count.
    "xla_cpu_experimental_ynn_fusion_type": ("none", "reduce", "conv", "invalid"),
}


class EnvironmentRefused(RuntimeError):
    """The user's environment sets a flag against the promise."""


def compiler_options(
    implementation: str = "portable", platform: str | None = None
) -> dict[str, Option]:
    """Options for `jax.jit(..., compiler_options=)` on `platform` (the default backend).

    `xla` gets none: it is XLA at its best. They only act on a top-level jit, so a function
    of yours that calls `jdet.generate_tokens` inside takes them on its own `jax.jit`.
    """
    if implementation == "xla":
        return {}
    platform = platform or jax.default_backend()
    return {**_COMMON, **(_GPU if platform in ("gpu", "cuda") else {})}


def jit(
    fun: Callable[..., Any], *, implementation: str = "portable", **kwargs: Any
) -> Callable[..., Any]:
    """`jax.jit` with `compiler_options(implementation)`; other keywords as there.

    Raises:
      EnvironmentRefused: XLA_FLAGS breaks the promise that `implementation` makes.
    """
    if implementation != "xla":
        check_environment()
    return jax.jit(fun, compiler_options=compiler_options(implementation), **kwargs)


def xla_flags(text: str | None = None) -> dict[str, str]:
    """The flags in `text` (XLA_FLAGS by default), name to value; no value reads as ''."""
    text = os.environ.get("XLA_FLAGS", "") if text is None else text
    pairs = (token.lstrip("-").partition("=") for token in text.split())
    return {name: value for name, _, value in pairs}


def check_environment(text: str | None = None) -> None:
    """Refuse flags that break the promise.

    Raises:
      EnvironmentRefused: XLA_FLAGS holds one; the message names it and the way out.
    """
    for name, value in xla_flags(text).items():
        if value.lower() in _FORBIDDEN.get(name, ()):
            raise EnvironmentRefused(
                f"XLA_FLAGS sets --{name}={value}, which breaks batch invariance; "
                "remove it, or choose implementation='xla', which promises nothing"
            )
