"""What tells one decoder from another: `DecoderConfig`, read from config.json or by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Family = Literal["llama", "qwen3"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with grouped-query attention and a SiLU-gated MLP.

    The field names are those of Hugging Face's config.json where it has one.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises every query and key head before RoPE."""
        return self.family == "qwen3"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read the dictionary of a published config.json.

        Raises:
          ValueError: the family or a feature it asks for is not supported; a key is missing.
        """
        family = config.get("model_type")
        if family not in ("llama", "qwen3"):
            raise ValueError(f"model_type {family!r} is not supported; supported: llama, qwen3")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope type {kind!r} is not supported; supported: default")
        for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
            if config.get(key):
                raise ValueError(f"config has {key}=true, which is not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; use: silu")
        try:
            heads = config["num_attention_heads"]
            theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
            return cls(
                family=family,
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads", heads),
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                rope_theta=float(theta),
                rms_norm_eps=config["rms_norm_eps"],
                max_position_embeddings=config["max_position_embeddings"],
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as missing:
            raise ValueError(f"config lacks {missing}") from None


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )


# Published shapes, so that any of them runs with random weights.
CONFIGS: dict[str, DecoderConfig] = {
    "SmolLM2-135M": DecoderConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
}
