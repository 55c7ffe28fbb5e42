"""Mistral's config.json."""

from typing import Any

from jdet.models.family import Json, read_shape, read_windows, refuse, whole


def read_config(config: Json) -> dict[str, Any]:
    """The fields of `DecoderConfig`: Llama's, with one window for every layer.

    As in transformers, `sliding_window` null is no window, and a config without the key has 4096
    (Mistral 7B v0.1).
    """
    refuse(config, "attention_bias", "layer_types")
    config = {"sliding_window": 4096, **config}
    sliding = config["sliding_window"] is not None
    windows = read_windows(config, [sliding] * whole(config, "num_hidden_layers"))
    return {**read_shape(config), "windows": windows[:1]}


def _mistral(vocab: int, theta: float, window: int | None) -> Json:
    return {
        "model_type": "mistral",
        "vocab_size": vocab,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "sliding_window": window,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }


PUBLISHED: dict[str, Json] = {
    "Mistral-7B-v0.1": _mistral(32000, 10000.0, 4096),
    "Mistral-7B-v0.3": _mistral(32768, 1000000.0, None),
}
