"""jdet: bitwise batch-invariant LLM inference in JAX.

The public names are imported on first use, so that `import jdet` stays cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdet import certify as certify
    from jdet import export as export
    from jdet.compiler import compiler_options as compiler_options
    from jdet.compiler import jit as jit
    from jdet.completion import Completion as Completion
    from jdet.contract import Contract as Contract
    from jdet.decoding import generate_tokens as generate_tokens
    from jdet.engine.aio import AsyncEngine as AsyncEngine
    from jdet.engine.config import EngineConfig as EngineConfig
    from jdet.engine.engine import Engine as Engine
    from jdet.generation import generate as generate
    from jdet.models.convert import convert as convert
    from jdet.models.load import load as load
    from jdet.models.load import random_model as random_model
    from jdet.ops import Ops as Ops
    from jdet.sampling import SamplingParams as SamplingParams
    from jdet.sampling import sampling_arrays as sampling_arrays
    from jdet.scoring import score as score
    from jdet.transform import batch_invariant as batch_invariant
    from jdet.transform import register_rule as register_rule

__version__ = "0.1.0"

_HOME = {
    "AsyncEngine": "jdet.engine.aio",
    "Completion": "jdet.completion",
    "Contract": "jdet.contract",
    "Engine": "jdet.engine.engine",
    "EngineConfig": "jdet.engine.config",
    "Ops": "jdet.ops",
    "SamplingParams": "jdet.sampling",
    "batch_invariant": "jdet.transform",
    "compiler_options": "jdet.compiler",
    "convert": "jdet.models.convert",
    "generate": "jdet.generation",
    "generate_tokens": "jdet.decoding",
    "jit": "jdet.compiler",
    "load": "jdet.models.load",
    "random_model": "jdet.models.load",
    "register_rule": "jdet.transform",
    "sampling_arrays": "jdet.sampling",
    "score": "jdet.scoring",
}

_MODULES = ("certify", "export")

__all__ = ["__version__", *sorted(_HOME), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"jdet.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'jdet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    # Bound here, so that the next access is an ordinary attribute.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
