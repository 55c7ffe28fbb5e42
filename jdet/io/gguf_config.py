"""The metadata of a GGUF file as a Hugging Face style config.json."""

from pathlib import Path
from typing import Any

import numpy as np

from jdet.io.errors import CheckpointError
from jdet.io.gguf_header import GGUFHeader

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_YARN = ("type", "factor", "original_context_length", "finetuned")


def read_config(header: GGUFHeader, path: Path) -> dict[str, Any]:
    """The configuration that a file's metadata and the shapes of its tensors describe.

    Raises:
        CheckpointError: Another architecture, or a key that is missing or of another type.
    """
    return _Metadata(header, path).config()


class _Metadata:
    """Reads the architecture's metadata keys, checking each one's type."""

    def __init__(self, header: GGUFHeader, path: Path) -> None:
        self._metadata = header.metadata
        self._shapes = {info.name: info.shape for info in header.tensors}
        self._path = path
        self._architecture = header.metadata.get("general.architecture")
        if self._architecture not in _CLASSES:
            raise CheckpointError(
                f"{path}: GGUF architecture {self._architecture!r} is not supported; "
                f"supported are {', '.join(_CLASSES)}"
            )

    def config(self) -> dict[str, Any]:
        heads = self._int("attention.head_count")
        hidden = self._int("embedding_length")
        head_dim = self._int("attention.key_length", hidden // heads)
        if self._int("rope.dimension_count", head_dim) != head_dim:
            raise CheckpointError(f"{self._path}: RoPE over a part of the head is not supported")
        if self._int("attention.value_length", head_dim) != head_dim:
            raise CheckpointError(f"{self._path}: keys and values of unequal width: not supported")
        embedding = self._shapes.get("token_embd.weight")
        if embedding is None or len(embedding) != 2:
            raise CheckpointError(f"{self._path}: no embedding tensor 'token_embd.weight' [V, D]")
        config = {
            "model_type": self._architecture,
            "architectures": [_CLASSES[str(self._architecture)]],
            "vocab_size": embedding[0],
            "hidden_size": hidden,
            "intermediate_size": self._int("feed_forward_length"),
            "num_hidden_layers": self._int("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._int("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._float("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "max_position_embeddings": self._int("context_length"),
            "tie_word_embeddings": "output.weight" not in self._shapes,
            "attention_bias": "blk.0.attn_q.bias" in self._shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in self._shapes,
            "hidden_act": "silu",
        }
        for key in ("bos_token_id", "eos_token_id"):
            config[key] = self._metadata.get(f"tokenizer.ggml.{key}")
        if self._architecture == "gemma3":
            return config | self._gemma(config)
        return config | (self._experts() if self._architecture == "qwen3moe" else {})

    def _experts(self) -> dict[str, Any]:
        """What a mixture's config has besides: llama.cpp has experts in every layer, and always
        normalises the weights of those that are chosen."""
        return {
            "model_type": "qwen3_moe",
            "num_experts": self._int("expert_count"),
            "num_experts_per_tok": self._int("expert_used_count"),
            "moe_intermediate_size": self._int("expert_feed_forward_length"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def _gemma(self, config: dict[str, Any]) -> dict[str, Any]:
        """What Gemma's config has besides; its constants are those of llama.cpp's loader."""
        scalar = config["head_dim"]
        if config["num_hidden_layers"] == 62:  # 27B alone scales scores by another width
            scalar = config["hidden_size"] // config["num_attention_heads"]
        cap = f"{self._architecture}.final_logit_softcapping"
        return {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": self._float("rope.freq_base", 1e6),
            "rope_local_base_freq": self._float("rope.freq_base_swa", 10000.0),
            "sliding_window": self._int("attention.sliding_window"),
            "sliding_window_pattern": self._int("attention.sliding_window_pattern", 6),
            "query_pre_attn_scalar": scalar,
            "final_logit_softcapping": self._metadata.get(cap),
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind = self._metadata.get(f"{self._architecture}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._float("rope.scaling.factor")}
        if kind != "yarn":
            raise CheckpointError(
                f"{self._path}: RoPE scaling {kind!r}; supported are none, linear, yarn"
            )
        prefix = f"{self._architecture}.rope.scaling."
        for key in self._metadata:
            if key.startswith(prefix) and key.removeprefix(prefix) not in _YARN:
                raise CheckpointError(f"{self._path}: {key} of RoPE scaling 'yarn': not supported")
        original = self._int("rope.scaling.original_context_length", self._int("context_length"))
        return {
            "rope_type": "yarn",
            "factor": self._float("rope.scaling.factor"),
            "original_max_position_embeddings": original,
        }

    def _int(self, key: str, default: int | None = None) -> int:
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise CheckpointError(
                f"{self._path}: metadata {self._architecture}.{key} is {value!r}; "
                "expected a positive integer"
            )
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise CheckpointError(
                f"{self._path}: metadata {self._architecture}.{key} is {value!r}; "
                "expected a positive number"
            )
        # The file holds a float32: 1e-5 comes back as 9.999999747378752e-06. Its shortest
        # decimal is what config.json says, and the same float32.
        return float(str(np.float32(value)))
