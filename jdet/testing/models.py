"""Shapes for tests: few layers, but the widths of a real model."""

from typing import Any, Literal


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


def tiny_config() -> dict[str, Any]:
    """A config.json dictionary for runs of thousands of steps: what is tested there follows
    from what is put together, and the widths of real models are tested elsewhere."""
    return {
        **small_config("qwen3", vocab_size=160),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
