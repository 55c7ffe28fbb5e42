"""What tells one decoder from another: `DecoderConfig`, read from config.json or by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jdet.models.families import FAMILIES, family_of
from jdet.models.rope import Rope
from jdet.pallas_kernels.gated_matmul import Activation


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with grouped-query attention and a gated MLP.

    The field names are those of Hugging Face's config.json where it has one.

    Attributes:
      family: a name of `families.FAMILIES`; no code but the checkpoint map asks for it.
      rope: of every layer; of those without a window where `local_rope` is given.
      local_rope: of the layers with a window.
      windows: how many keys a query of each layer sees at most (None: all), repeated over the
        layers.
      qk_norm: every query and key head is normalised before RoPE.
      qkv_bias, out_bias: attention's projections add a bias.
      post_norms: the outputs of attention and MLP are normalised before they are added.
      unit_offset_norms: checkpoints store a norm's weight less 1. The decoder holds the whole
        weight, in float32, in which the sum is exact for a checkpoint's bfloat16.
      scale_embeddings: embeddings are multiplied by sqrt(hidden_size), rounded to their dtype.
      attention_scale: what scores are multiplied by; None: head_dim**-0.5.
      final_soft_cap: c: logits become c * tanh(logits / c).
      num_experts: of the layers that have experts in the MLP's place; 0: none has.
      mlp_only_layers, decoder_sparse_step: which layers have no experts (`has_experts`).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    local_rope: Rope | None = None
    windows: tuple[int | None, ...] = (None,)
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    activation: Activation = "silu"
    post_norms: bool = False
    unit_offset_norms: bool = False
    scale_embeddings: bool = False
    attention_scale: float | None = None
    final_soft_cap: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The ropes of the layers; a table each."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def window(self, layer: int) -> int | None:
        """The attention window of a layer."""
        return self.windows[layer % len(self.windows)]

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in the MLP's place."""
        sparse = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and sparse and layer not in self.mlp_only_layers

    def rope_index(self, layer: int) -> int:
        """Which of `ropes` a layer turns by."""
        return int(self.local_rope is not None and self.window(layer) is not None)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read the dictionary of a published config.json.

        Raises:
          ValueError: the family or a feature it asks for is not supported; a key is missing.
        """
        name = family_of(config.get("model_type"))
        return cls(family=name, **FAMILIES[name].read_config(config))


# Published shapes, so that any of them runs with random weights.
CONFIGS: dict[str, DecoderConfig] = {
    name: DecoderConfig.from_hf(config)
    for family in FAMILIES.values()
    for name, config in family.published.items()
}
