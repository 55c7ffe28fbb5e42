"""Mistral's dense models. See README.md."""

from jdet.models.family import Family
from jdet.models.llama.checkpoint import TENSORS
from jdet.models.mistral.config import PUBLISHED, read_config

FAMILY = Family(("mistral",), read_config, TENSORS, PUBLISHED)
