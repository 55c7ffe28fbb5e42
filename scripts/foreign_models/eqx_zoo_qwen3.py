"""Qwen3 of eqx-zoo (Equinox): eqx_zoo/models/causal_lm/model.py, one prompt under jax.vmap."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from eqx_zoo import CausalLM, Config
from foreign_models.example import Example, Tokens, randomised, spoiled
from jax.typing import DTypeLike

import jdet

PACKAGE = "eqx-zoo"

TINY = Config(
    architecture="Qwen3ForCausalLM",
    vocab_size=300,
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
    attention_bias=False,
    qk_norm=True,
    rope_scaling=None,
)
# The widths of Qwen3-0.6B.
REAL = dataclasses.replace(
    TINY,
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=1_000_000.0,
    tie_word_embeddings=True,
)
SIZES = {"tiny": TINY, "real": REAL}


def of_config(config: Config, dtype: DTypeLike, options: dict[str, Any]) -> Example:
    """The example of any config of the package's."""
    made = CausalLM(config, key=jax.random.key(0), dtype=dtype)
    arrays, rest = eqx.partition(made, eqx.is_array)
    weights = randomised(arrays, dtype)
    where = lambda model: model.model.embed_tokens.weight  # noqa: E731
    weights = eqx.tree_at(where, weights, spoiled(where(weights)))
    tokens = Tokens(config.vocab_size, 13)

    def forward(weights: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = eqx.combine(weights, rest)
        # A causal model needs no mask for padding that stands on the right.
        return jax.vmap(lambda row: model(row)[0])(batch["tokens"])

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
        about={
            name: value
            for name, value in dataclasses.asdict(config).items()
            if isinstance(value, int) and not isinstance(value, bool)
        }
        | {"tokens": tokens.length},
    )


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    return of_config(SIZES[size], jnp.dtype(dtype), options)
