"""Qwen2's config.json, which is Qwen2.5's too."""

from typing import Any

from jdet.models.family import Json, read_shape, read_windows, whole


def read_qwen_windows(config: Json) -> tuple[int | None, ...]:
    """Windows where `use_sliding_window` is set: from layer `max_window_layers` on."""
    layers = whole(config, "num_hidden_layers")
    if not config.get("use_sliding_window", False):
        return read_windows({**config, "sliding_window": None}, [False] * layers)
    first = config.get("max_window_layers", 28)
    sliding = config.get("sliding_window", 4096) is not None
    return read_windows(
        {"sliding_window": 4096, **config}, [sliding and i >= first for i in range(layers)]
    )


def read_config(config: Json) -> dict[str, Any]:
    """The fields of `DecoderConfig`: Llama's, with biases of query, key and value, and windows."""
    windows = read_qwen_windows(config)
    return {**read_shape(config), "windows": windows, "qkv_bias": True, "out_bias": False}


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, positions: int
) -> Json:
    tied = hidden < 3000
    return {
        "model_type": "qwen2",
        "vocab_size": 151936 if tied else 152064,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


PUBLISHED: dict[str, Json] = {
    "Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 32768),
    "Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, 131072),
}
