"""Llama's config.json."""

from typing import Any

from jdet.models.family import Json, read_shape, refuse


def read_config(config: Json) -> dict[str, Any]:
    """The fields of `DecoderConfig`. Llama has no windows: a config with one is another model's."""
    refuse(config, "use_sliding_window", "sliding_window")
    return read_shape(config)


def _llama3(hidden: int, intermediate: int, layers: int, heads: int, factor: float) -> Json:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        # The small models of 3.2, whose factor is 32, tie their head.
        "tie_word_embeddings": factor == 32.0,
    }


PUBLISHED: dict[str, Json] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": _llama3(4096, 14336, 32, 32, factor=8.0),
    "Llama-3.2-1B": _llama3(2048, 8192, 16, 32, factor=32.0),
    "Llama-3.2-3B": {**_llama3(3072, 8192, 28, 24, factor=32.0), "head_dim": 128},
}
