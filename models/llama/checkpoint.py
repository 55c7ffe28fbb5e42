"""Where the tensors of Llama's checkpoints go; most families name theirs alike."""

_LAYER = "model.layers.{}."
_ATTENTION = _LAYER + "self_attn."

TENSORS: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens.weight",),
    "layers.{}.attention_norm": (_LAYER + "input_layernorm.weight",),
    "layers.{}.attention.qkv": tuple(f"{_ATTENTION}{name}_proj.weight" for name in "qkv"),
    "layers.{}.attention.qkv_bias": tuple(f"{_ATTENTION}{name}_proj.bias" for name in "qkv"),
    "layers.{}.attention.q_norm": (_ATTENTION + "q_norm.weight",),
    "layers.{}.attention.k_norm": (_ATTENTION + "k_norm.weight",),
    "layers.{}.attention.out": (_ATTENTION + "o_proj.weight",),
    "layers.{}.attention.out_bias": (_ATTENTION + "o_proj.bias",),
    "layers.{}.mlp_norm": (_LAYER + "post_attention_layernorm.weight",),
    "layers.{}.mlp.gate_up": (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    "layers.{}.mlp.down": (_LAYER + "mlp.down_proj.weight",),
    "norm": ("model.norm.weight",),
    "lm_head": ("lm_head.weight",),
}
