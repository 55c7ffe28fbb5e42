"""Where the tensors of Qwen3-MoE's checkpoints go: Llama's, and a router and experts a layer."""

from jdet.models.llama.checkpoint import TENSORS as LLAMA

_MLP = "model.layers.{}.mlp."
_EXPERT = _MLP + "experts.{}."

TENSORS: dict[str, tuple[str, ...]] = {
    **LLAMA,
    "layers.{}.experts.router": (_MLP + "gate.weight",),
    "layers.{}.experts.gate_up": (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    "layers.{}.experts.down": (_EXPERT + "down_proj.weight",),
}
