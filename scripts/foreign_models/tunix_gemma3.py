"""Gemma 3 of google-tunix (Flax NNX): tunix/models/gemma3/model.py, a whole prompt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from foreign_models.example import Example, Tokens, bare_package, random_nnx
from jax.typing import DTypeLike

import jdet

bare_package("tunix")
from tunix.models.gemma3 import model as gemma3  # noqa: E402

PACKAGE = "google-tunix"


def config_of(size: str) -> tuple[gemma3.ModelConfig, int]:
    """A config and the real tokens of a prompt."""
    tiny = gemma3.ModelConfig(
        num_layers=6,
        num_embed=300,
        embed_dim=192,
        hidden_dim=576,
        num_heads=4,
        head_dim=16,
        num_kv_heads=1,
        sliding_window_size=5,
    )
    return {
        "tiny": (tiny, 13),
        "real": (dataclasses.replace(gemma3.ModelConfig.gemma3_270m(), num_layers=6), 13),
        "large": (dataclasses.replace(gemma3.ModelConfig.gemma3_4b_it(), num_layers=6), 61),
        "long": (dataclasses.replace(gemma3.ModelConfig.gemma3_4b_it(), num_layers=6), 1021),
    }[size]


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    config, length = config_of(size)
    config = dataclasses.replace(config, param_dtype=jnp.dtype(dtype))
    structure, weights = random_nnx(lambda: gemma3.Gemma3(config, rngs=nnx.Rngs(0)), dtype)
    tokens = Tokens(config.num_embed, length)

    def forward(weights: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = nnx.merge(structure, weights)
        logits, _ = model(batch["tokens"], batch["positions"], None, batch["mask"])
        return logits

    names = ("num_layers", "num_embed", "embed_dim", "hidden_dim", "num_heads", "head_dim")
    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=weights,
        requests=tokens.requests,
        extremes=tokens.extremes,
        batch=tokens.batch,
        real=tokens.real,
        pads=(3, 0, 7, 20),
        timed=(8,),
        about={name: getattr(config, name) for name in (*names, "num_kv_heads")}
        | {"tokens": length},
    )
