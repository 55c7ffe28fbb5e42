"""Qwen3 of google-tunix (Flax NNX): some steps of decoding in one program.

A loop on the device with the model's own cache, as tunix's sampler runs it
(tunix/generate/sampler.py); greedy.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from foreign_models.example import Example
from foreign_models.tunix_qwen3 import PACKAGE as PACKAGE
from foreign_models.tunix_qwen3 import about, config_of, create
from foreign_models.tunix_qwen3_decode import TIMED, Steps
from jax import lax
from jax.typing import DTypeLike

import jdet

STEPS = 16


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    config, length, timed = config_of(size)
    structure, weights = create(config, dtype)
    steps = Steps(config, length, jnp.dtype(dtype), STEPS)

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

    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=weights,
        requests=steps.requests,
        extremes=steps.extremes,
        batch=steps.batch,
        real=lambda logits: logits,
        pads=(2, 0, 7, 20),
        timed=TIMED.get(size, timed),
        about=about(config) | {"cached tokens": length, "steps": STEPS},
    )
