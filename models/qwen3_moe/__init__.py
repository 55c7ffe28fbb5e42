"""Qwen3, mixture of experts. See README.md."""

from jdet.models.family import Family
from jdet.models.qwen3_moe.checkpoint import TENSORS
from jdet.models.qwen3_moe.config import PUBLISHED, read_config

FAMILY = Family(("qwen3_moe",), read_config, TENSORS, PUBLISHED)
