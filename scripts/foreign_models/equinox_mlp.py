"""The multi-layer perceptron of Equinox: equinox/nn/_mlp.py, one vector under jax.vmap."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from foreign_models.example import Example, Images, randomised
from jax.typing import DTypeLike

import jdet

PACKAGE = "equinox"

SIZES = {
    "tiny": {"in_size": 200, "out_size": 50, "width_size": 1000, "depth": 2},
    "real": {"in_size": 4096, "out_size": 1000, "width_size": 4096, "depth": 3},
}


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    config = SIZES[size]
    made = eqx.nn.MLP(**config, key=jax.random.key(0), activation=jax.nn.gelu)
    arrays, rest = eqx.partition(made, eqx.is_array)
    vectors = Images((config["in_size"],))

    def forward(weights: Any, batch: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(weights, rest))(batch.astype(dtype))

    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=randomised(arrays, jnp.dtype(dtype)),
        requests=vectors.requests,
        extremes=vectors.extremes,
        batch=vectors.batch,
        real=vectors.real,
        pads=(0,),
        timed=(8, 1),
        about=config,
    )
