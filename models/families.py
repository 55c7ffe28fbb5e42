"""The families this library reads, told apart by config.json's `model_type`."""

from typing import Any

from jdet.models import gemma3, llama, mistral, qwen2, qwen3, qwen3_moe
from jdet.models.family import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "gemma3": gemma3.FAMILY,
}

_BY_TYPE = {kind: name for name, family in FAMILIES.items() for kind in family.model_types}


def family_of(model_type: Any) -> str:
    """The name of the family of a `model_type`.

    Raises:
      ValueError: no family has it; the known ones are listed.
    """
    if model_type not in _BY_TYPE:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(_BY_TYPE)}"
        )
    return _BY_TYPE[model_type]
