"""Qwen3's config.json."""

from typing import Any

from jdet.models.family import Json, read_shape
from jdet.models.qwen2.config import read_qwen_windows


def read_config(config: Json) -> dict[str, Any]:
    """The fields of `DecoderConfig`: Llama's, with norms of query and key heads, and windows.

    As in transformers, a config without `head_dim` has 128.
    """
    config = {"head_dim": 128, **config}
    return {**read_shape(config), "windows": read_qwen_windows(config), "qk_norm": True}


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> Json:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": hidden < 4096,
    }


PUBLISHED: dict[str, Json] = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64),
}
