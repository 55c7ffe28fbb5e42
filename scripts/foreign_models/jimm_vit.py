"""The vision transformer of jax-image-models (Flax NNX): jimm/models/vit/vit_model.py.

Its weights stand on a mesh with explicit axes, here of one device, and its layers in a scan.
"""

from typing import Any

import jax
import jimm
import numpy as np
from flax import nnx
from foreign_models.example import Example, Images, randomised
from jax.typing import DTypeLike
from numpy.random import Generator

import jdet

PACKAGE = "jax-image-models"

TINY = {
    "num_classes": 50,
    "img_size": 24,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_dim": 576,
    "hidden_size": 192,
}
# ViT-B/16 with 2 of its 12 layers.
REAL = {
    "num_classes": 1000,
    "img_size": 224,
    "patch_size": 16,
    "num_layers": 2,
    "num_heads": 12,
    "mlp_dim": 3072,
    "hidden_size": 768,
}
SIZES = {"tiny": TINY, "real": REAL}


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    config: dict[str, Any] = SIZES[size]
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        made = jimm.VisionTransformer(**config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    made.eval()
    structure, state = nnx.split(made)
    images = Images((config["img_size"], config["img_size"], 3))

    def batch(requests: np.ndarray, pad: int, rng: Generator) -> jax.Array:
        return jax.device_put(requests, jax.NamedSharding(mesh, jax.P()))

    def forward(weights: Any, batch: jax.Array) -> jax.Array:
        return nnx.merge(structure, weights)(batch.astype(dtype))

    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=randomised(state, dtype),
        requests=images.requests,
        extremes=images.extremes,
        batch=batch,
        real=images.real,
        pads=(0,),
        timed=(8,),
        about=config,
    )
