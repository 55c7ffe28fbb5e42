"""Gated matmul for TPU: `matmul`'s kernel with a gate in its epilogue.

Tree: both products are those of matmul/mosaic_tpu.py with one leaf, rounded to x's dtype; the
gate is float32, one fixed sequence of operations: silu(g) u = g / (1 + e**-g) * u, and for GELU
in its tanh form g / (1 + e**-z) * u with z = g * (c0 + c1 * (g * g)); rounded once.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jdet.pallas_kernels.gated_matmul import Activation
from jdet.pallas_kernels.matmul.mosaic_tpu import Schedule, matmul_gated

__all__ = ["Schedule", "gated_matmul", "gelu_mul", "silu_mul"]

_GELU = (1.5957691216057308, 0.07135481627260025)  # 2 sqrt(2 / pi), and 0.044715 times it


def silu_mul(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up of two float32 tiles."""
    return gate / (1.0 + jnp.exp(-gate)) * up


def gelu_mul(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gelu(gate) * up of two float32 tiles, GELU in its tanh form."""
    z = gate * (_GELU[0] + _GELU[1] * (gate * gate))
    return gate / (1.0 + jnp.exp(-z)) * up


_GATES = {"silu": silu_mul, "gelu_tanh": gelu_mul}


def gated_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    activation: Activation = "silu",
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[M, F] = activation(x @ w[:F]^T) * (x @ w[F:]^T); see the module for the tree.

    Args:
      x: [M, K], bfloat16 or float32.
      w: [2 F, K], of x's dtype; F in multiples of 16, or XLA copies it.
      activation: "silu" or "gelu_tanh".
      schedule: by shape unless given. Never changes the result.
      interpret: private hook of the tests, `pltpu.InterpretParams()` or True to run on a CPU.

    Raises:
      ValueError: shapes that do not go together.
      NotImplementedError: dtypes that the kernel does not take.
    """
    return matmul_gated(x, w, _GATES[activation], schedule=schedule, interpret=interpret)
