"""Qwen3 of google-tunix (Flax NNX): some steps of decoding in one program.

A loop on the device with the model's own cache, as tunix's sampler runs it
(tunix/generate/sampler.py); greedy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from foreign_models.example import Example
from foreign_models.tunix_qwen3 import PACKAGE as PACKAGE
from foreign_models.tunix_qwen3_decode import example
from jax import lax
from jax.typing import DTypeLike

STEPS = 16


def _forward_of(structure: Any, config: Any) -> Callable[..., jax.Array]:
    def forward(weights: Any, batch: dict[str, Any]) -> jax.Array:
        """The logits of every step, [B, STEPS, V]."""
        model = nnx.merge(structure, weights)
        slots = jnp.arange(batch["mask"].shape[2])

        def step(i: jax.Array, carried: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens, positions, cache, made = carried
            mask = slots <= positions[:, :, None]
            logits, cache = model(tokens, positions, cache, mask)
            tokens = jnp.argmax(logits, -1).astype(jnp.int32)
            return tokens, positions + 1, cache, lax.dynamic_update_index_in_dim(made, logits, i, 1)

        count = batch["tokens"].shape[0]
        made = jnp.zeros((count, STEPS, config.vocab_size), jnp.float32)
        carried = batch["tokens"], batch["positions"], batch["cache"], made
        return lax.fori_loop(0, STEPS, step, carried)[3]

    return forward


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    return example(size, dtype, _forward_of, STEPS, **options)
