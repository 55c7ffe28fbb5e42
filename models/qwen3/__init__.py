"""Qwen3, dense. See README.md."""

from jdet.models.family import Family
from jdet.models.llama.checkpoint import TENSORS
from jdet.models.qwen3.config import PUBLISHED, read_config

FAMILY = Family(("qwen3",), read_config, TENSORS, PUBLISHED)
