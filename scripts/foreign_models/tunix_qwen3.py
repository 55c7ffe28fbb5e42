"""Qwen3 of google-tunix (Flax NNX): tunix/models/qwen3/model.py, a whole prompt.

`tunix` itself imports trainers, data sets and TensorFlow; the model's module needs jax, flax and
jaxtyping only.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from foreign_models.example import Example, Tokens, bare_package, random_nnx
from jax.typing import DTypeLike

import jdet

bare_package("tunix")
from tunix.models.qwen3 import model as qwen3  # noqa: E402

PACKAGE = "google-tunix"


def config_of(size: str) -> tuple[qwen3.ModelConfig, int, tuple[int, ...]]:
    """A config, the real tokens of a prompt, and the batch sizes to time."""
    tiny = qwen3.ModelConfig(
        num_layers=2,
        vocab_size=300,
        embed_dim=192,
        hidden_dim=576,
        num_heads=6,
        head_dim=16,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    return {
        "tiny": (tiny, 13, (8,)),
        "real": (dataclasses.replace(qwen3.ModelConfig.qwen3_0p6b(), num_layers=2), 13, (8,)),
        "large": (dataclasses.replace(qwen3.ModelConfig.qwen3_8b(), num_layers=4), 61, (8,)),
        "long": (dataclasses.replace(qwen3.ModelConfig.qwen3_8b(), num_layers=4), 1021, (8,)),
        "full": (qwen3.ModelConfig.qwen3_8b(), 1021, (8,)),
    }[size]


def create(config: qwen3.ModelConfig, dtype: DTypeLike) -> tuple[Any, Any]:
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    return random_nnx(lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(0)), dtype)


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    config, length, timed = config_of(size)
    structure, weights = create(config, dtype)
    tokens = Tokens(config.vocab_size, length)

    def forward(weights: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = nnx.merge(structure, weights)
        logits, _ = model(batch["tokens"], batch["positions"], None, batch["mask"])
        return logits

    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=weights,
        requests=tokens.requests,
        extremes=tokens.extremes,
        batch=tokens.batch,
        real=tokens.real,
        pads=(3, 0, 7, 20),
        timed=timed,
        about=about(config) | {"tokens": length},
    )


def about(config: qwen3.ModelConfig) -> dict[str, Any]:
    names = ("num_layers", "vocab_size", "embed_dim", "hidden_dim", "num_heads", "head_dim")
    return {name: getattr(config, name) for name in (*names, "num_kv_heads")}
