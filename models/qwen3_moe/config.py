"""Qwen3-MoE's config.json."""

from typing import Any

from jdet.models import qwen3
from jdet.models.family import Json, whole


def read_config(config: Json) -> dict[str, Any]:
    """The fields of `DecoderConfig`: Qwen3's, and the experts.

    Raises:
      ValueError: more experts a token than there are; layers that do not exist; as for Qwen3.
    """
    fields = qwen3.FAMILY.read_config(config)
    if fields["activation"] != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported of experts; silu")
    # transformers 5 writes the other name.
    experts = whole(config, "num_experts", config.get("num_local_experts"))
    chosen = whole(config, "num_experts_per_tok")
    if chosen > experts:
        raise ValueError(f"config has num_experts_per_tok={chosen} of num_experts={experts}")
    dense, layers = config.get("mlp_only_layers") or [], fields["num_hidden_layers"]
    if not all(isinstance(i, int) and 0 <= i < layers for i in dense):
        raise ValueError(f"config has mlp_only_layers={dense}; allowed: 0 to {layers - 1}")
    return {
        **fields,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": whole(config, "moe_intermediate_size"),
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        "decoder_sparse_step": whole(config, "decoder_sparse_step", 1),
        "mlp_only_layers": tuple(dense),
    }


def _qwen3_moe(hidden: int, intermediate: int, layers: int, heads: int, inner: int) -> Json:
    return {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "moe_intermediate_size": inner,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    }


PUBLISHED: dict[str, Json] = {
    "Qwen3-30B-A3B": _qwen3_moe(2048, 6144, 48, 32, 768),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 12288, 94, 64, 1536),
}
