"""Gemma 3, text. See README.md."""

from jdet.models.family import Family
from jdet.models.gemma3.checkpoint import TENSORS, rename
from jdet.models.gemma3.config import PUBLISHED, read_config

FAMILY = Family(("gemma3_text", "gemma3"), read_config, TENSORS, PUBLISHED, rename)
