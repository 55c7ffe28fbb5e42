"""The TPUs that the Pallas TPU kernels are compiled for, and the dtypes that they take."""

import dataclasses
from typing import Any

import jax.numpy as jnp

OPERANDS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Generation:
    """A TPU that the kernels are compiled for.

    Attributes:
      name: as Google writes it.
      device_kinds: what jax calls its devices.
      topology: one host's, for a compile without a chip (`jax.experimental.topologies`).
    """

    name: str
    device_kinds: tuple[str, ...]
    topology: str


GENERATIONS = (
    Generation("v5e", ("TPU v5 lite", "TPU v5e"), "v5e:2x2"),
    Generation("v5p", ("TPU v5", "TPU v5p"), "v5p:2x2x1"),
    Generation("v6e", ("TPU v6 lite", "TPU v6e"), "v6e:2x2"),
    Generation("tpu7x", ("TPU7x",), "tpu7x:2x2x1"),
)


def generation_of(device: Any) -> Generation:
    """The generation of a jax device, or of one of a topology.

    Raises:
      NotImplementedError: nobody has compiled the kernels for it.
    """
    for generation in GENERATIONS:
        if device.device_kind in generation.device_kinds:
            return generation
    known = ", ".join(g.name for g in GENERATIONS)
    raise NotImplementedError(
        f"the TPU kernels have not been compiled for {device.device_kind!r}, only for {known};"
        " pass implementation='portable' to use plain jnp there"
    )
