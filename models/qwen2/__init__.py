"""Qwen2 and Qwen2.5, dense. See README.md."""

from jdet.models.family import Family
from jdet.models.llama.checkpoint import TENSORS
from jdet.models.qwen2.config import PUBLISHED, read_config

FAMILY = Family(("qwen2",), read_config, TENSORS, PUBLISHED)
