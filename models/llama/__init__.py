"""Llama 2 and 3, and models of their architecture such as SmolLM2. See README.md."""

from jdet.models.family import Family
from jdet.models.llama.checkpoint import TENSORS
from jdet.models.llama.config import PUBLISHED, read_config

FAMILY = Family(("llama",), read_config, TENSORS, PUBLISHED)
