"""Qwen3 of google-tunix (Flax NNX): one step of decoding, with the model's own cache.

tunix's cache has one place to write for the whole batch, so its requests are of one length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from foreign_models.example import Example
from foreign_models.tunix_qwen3 import PACKAGE as PACKAGE
from foreign_models.tunix_qwen3 import about, config_of, create
from jax.typing import DTypeLike
from numpy.random import Generator

import jdet

TIMED = {"long": (1, 32), "full": (1, 32)}


class Steps(NamedTuple):
    """Requests: one token, and random keys and values of the `length` tokens before it.

    Attributes:
      config: the model's.
      length: tokens in the cache.
      dtype: of the cache.
      steps: tokens there must be room for.
    """

    config: Any
    length: int
    dtype: DTypeLike
    steps: int = 1

    def requests(self, rng: Generator, count: int, scale: float = 1.0) -> dict[str, Any]:
        config, layers = self.config, range(self.config.num_layers)
        # Each layer has its own part of one draw: billions of normal numbers take minutes.
        shape = (count, self.length + len(layers), config.num_kv_heads, config.head_dim)
        keys, values = (
            (scale * rng.standard_normal(shape, np.float32)).astype(self.dtype) for _ in range(2)
        )

        def parts(drawn: np.ndarray) -> dict[str, np.ndarray]:
            return {f"layer_{i}": drawn[:, i : i + self.length] for i in layers}

        return {
            "token": rng.integers(0, config.vocab_size - 1, (count, 1), np.int32),
            "keys": parts(keys),
            "values": parts(values),
        }

    def extremes(self, rng: Generator, count: int) -> dict[str, Any]:
        """Keys and values of some 1e30, NaN in every second request."""
        found = self.requests(rng, count, 1e30)
        for values in found["values"].values():
            values[::2] = np.nan
        return found

    def batch(self, requests: dict[str, Any], pad: int, rng: Generator) -> dict[str, Any]:
        """What the model's `__call__` takes; of the cache, `pad` slots are never written."""
        count, slots = len(requests["token"]), self.length + self.steps + pad

        def filled(kept: np.ndarray) -> np.ndarray:
            shape = (count, slots - self.length, *kept.shape[2:])
            garbage = rng.standard_normal(shape, np.float32).astype(self.dtype)
            return np.concatenate([kept, garbage], 1)

        end = np.full((count,), self.length, np.int32)
        return {
            "tokens": requests["token"],
            "positions": end[:, None],
            "cache": {
                name: {
                    "k": filled(keys),
                    "v": filled(requests["values"][name]),
                    "end_index": end,
                }
                for name, keys in requests["keys"].items()
            },
            "mask": np.tile(np.arange(slots) <= self.length, (count, 1, 1)),
        }


def example(
    size: str, dtype: DTypeLike, forward_of: Callable[..., Any], steps: int = 1, **options: Any
) -> Example:
    """Of `forward_of(structure, config)`, a function of weights and a batch, for so many steps."""
    config, length, timed = config_of(size)
    structure, weights = create(config, dtype)
    forward = forward_of(structure, config)
    requests = Steps(config, length, jnp.dtype(dtype), steps)
    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=weights,
        requests=requests.requests,
        extremes=requests.extremes,
        batch=requests.batch,
        real=lambda logits: logits,
        pads=(2, 0, 7, 20),
        timed=TIMED.get(size, timed),
        about=about(config) | {"cached tokens": length, "steps": steps},
    )


def _forward_of(structure: Any, config: Any) -> Callable[..., jax.Array]:
    del config

    def forward(weights: Any, batch: dict[str, Any]) -> jax.Array:
        model = nnx.merge(structure, weights)
        logits, _ = model(batch["tokens"], batch["positions"], batch["cache"], batch["mask"])
        return logits

    return forward


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    return example(size, dtype, _forward_of, **options)
