"""ResNet of dm-haiku: haiku/_src/nets/resnet.py, with batch norm as in inference."""

from typing import Any

import haiku as hk
import jax
from foreign_models.example import Example, Images, randomised
from jax.typing import DTypeLike

import jdet

PACKAGE = "dm-haiku"

SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "tiny": (
        32,
        {
            "blocks_per_group": (1, 1, 1, 1),
            "channels_per_group": (32, 48, 64, 96),
            "num_classes": 50,
        },
    ),
    # ResNet-50.
    "real": (224, {**hk.nets.ResNet.CONFIGS[50], "num_classes": 1000}),
}


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    side, config = SIZES[size]
    images = Images((side, side, 3))

    @hk.without_apply_rng
    @hk.transform_with_state
    def network(batch: jax.Array, is_training: bool) -> jax.Array:
        return hk.nets.ResNet(**config)(batch, is_training)

    def forward(weights: Any, batch: jax.Array) -> jax.Array:
        logits, _ = network.apply(*weights, batch.astype(dtype), False)
        return logits

    # Only a training step makes the averages that batch norm takes in inference.
    first = jax.random.normal(jax.random.key(1), (4, side, side, 3), dtype)
    init = jax.jit(network.init, static_argnums=2)
    parameters, averages = init(jax.random.key(0), first, True)
    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=(randomised(parameters, dtype), averages),
        requests=images.requests,
        extremes=images.extremes,
        batch=images.batch,
        real=images.real,
        pads=(0,),
        timed=(8,),
        about={**config, "image": side},
    )
