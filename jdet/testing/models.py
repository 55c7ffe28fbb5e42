"""Shapes for tests: few layers, but the widths of a real model."""

from typing import Any, Literal

type Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3"]


def small_config(
    family: Literal["llama", "qwen3", "qwen3_moe"] = "llama",
    *,
    layers: int = 2,
    vocab_size: int = 1536,
) -> dict[str, Any]:
    """A config.json dictionary with SmolLM2's widths (llama) or narrow Qwen3 ones.

    With experts (qwen3_moe) the first layer has none, the others 8, of which a token has 3.

    The widths are real because which kernel a library picks follows them: a model of width
    16 would pass on a build that fails for every model people use.
    """
    common = {
        "vocab_size": vocab_size,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
    }
    if family == "llama":
        return {
            **common,
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "rope_theta": 1e5,
            "tie_word_embeddings": True,
        }
    experts = {
        "moe_intermediate_size": 384,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    }
    return {
        **common,
        **(experts if family == "qwen3_moe" else {}),
        "model_type": family,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }


def tiny_config(family: Family = "qwen3") -> dict[str, Any]:
    """A config.json dictionary for runs of thousands of steps, or of many models: what is tested
    there follows from what is put together, and the widths of real models are tested elsewhere.

    Windows of 20 keys, where the family has windows; of both kinds of layers, where it has both.
    """
    common = {
        **small_config("qwen3", vocab_size=160),
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    if family == "mistral":
        return {**common, "sliding_window": 20}
    if family == "qwen2":
        return {**common, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    if family == "gemma3":
        return {
            **common,
            "model_type": "gemma3_text",
            "sliding_window": 20,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 24,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        }
    return common
