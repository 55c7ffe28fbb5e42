"""ConvNeXt V2 of equimo (Equinox): equimo/vision/models/convnext.py, one image under jax.vmap.

Depthwise and strided convolutions, and a global response normalisation over the whole image.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equimo.vision.models.convnext import ConvNeXt, convnext_v2_sizes
from foreign_models.example import Example, Images, randomised
from jax.typing import DTypeLike

import jdet

PACKAGE = "equimo"

SIZES = {
    "tiny": (32, {"depths": [1, 1, 1, 1], "dims": [16, 24, 40, 72], "num_classes": 50}),
    "real": (224, {**convnext_v2_sizes["atto"], "num_classes": 1000}),
}


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    side, config = SIZES[size]
    made = ConvNeXt(use_grn=True, layer_scale_init_value=None, key=jax.random.key(0), **config)
    arrays, rest = eqx.partition(eqx.nn.inference_mode(made), eqx.is_array)
    images = Images((3, side, side))

    def forward(weights: Any, batch: jax.Array) -> jax.Array:
        model = eqx.combine(weights, rest)
        return jax.vmap(lambda image: model(image, inference=True))(batch.astype(dtype))

    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=randomised(arrays, jnp.dtype(dtype)),
        requests=images.requests,
        extremes=images.extremes,
        batch=images.batch,
        real=images.real,
        pads=(0,),
        timed=(8,),
        about={**config, "image": side},
    )
