"""Gemma 3's config.json: of the text models, and of the multimodal ones their text part."""

from typing import Any

from jdet.models.family import Json, read_shape, read_windows, refuse, whole

# What published files leave out: the defaults of transformers' Gemma3TextConfig.
_DEFAULTS: Json = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def read_config(config: Json) -> dict[str, Any]:
    """The fields of `DecoderConfig`.

    Without `layer_types`, every sixth layer (`sliding_window_pattern`) sees everything. Scaled
    rope is of those layers; the sliding ones have a base of their own and no scaling.
    """
    if config["model_type"] == "gemma3":
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ValueError("config lacks 'text_config'")
        config = {"tie_word_embeddings": config.get("tie_word_embeddings", True), **text}
    config = {**_DEFAULTS, **config}
    refuse(config, "attn_logit_softcapping")
    pattern = whole(config, "sliding_window_pattern", 6)
    layers = whole(config, "num_hidden_layers")
    cap = config.get("final_logit_softcapping")
    return {
        **read_shape({**config, "rope_parameters": _ropes(config)}, "hidden_activation"),
        "windows": read_windows(config, [(i + 1) % pattern > 0 for i in range(layers)]),
        "qk_norm": True,
        "post_norms": True,
        "unit_offset_norms": True,
        "scale_embeddings": True,
        "attention_scale": whole(config, "query_pre_attn_scalar") ** -0.5,
        "final_soft_cap": None if cap is None else float(cap),
    }


def _ropes(config: Json) -> Json:
    """Both ropes in one spelling, that of transformers 5."""
    given = config.get("rope_parameters") or {}
    full = {
        "rope_theta": config.get("rope_theta", 1e6),
        **(given.get("full_attention") or {}),
        **(config.get("rope_scaling") or {}),
    }
    local = {
        "rope_theta": config.get("rope_local_base_freq", 1e4),
        **(given.get("sliding_attention") or {}),
    }
    return {"full_attention": full, "sliding_attention": local}


PUBLISHED: dict[str, Json] = {
    "Gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
    "Gemma-3-1B": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
    "Gemma-3-4B": {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
}
