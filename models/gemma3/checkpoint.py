"""Where the tensors of Gemma 3's checkpoints go."""

from jdet.models.llama.checkpoint import TENSORS as LLAMA

_LAYER = "model.layers.{}."

# The norm that Llama calls post_attention_layernorm comes before the MLP; this one does not.
TENSORS: dict[str, tuple[str, ...]] = {
    **LLAMA,
    "layers.{}.attention_post_norm": (_LAYER + "post_attention_layernorm.weight",),
    "layers.{}.mlp_norm": (_LAYER + "pre_feedforward_layernorm.weight",),
    "layers.{}.mlp_post_norm": (_LAYER + "post_feedforward_layernorm.weight",),
}

# A multimodal file's text part, as transformers 5 and as earlier versions wrote it.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")


def rename(name: str) -> str | None:
    """The name in a text-only file; None for the vision tower and its projector."""
    if name.removeprefix("model.").startswith(_OTHER_PARTS):
        return None
    for prefix, ours in _PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name
