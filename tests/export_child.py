"""Loads an exported program and runs it, in a process that may not trace the model.

Arguments: the file, an .npz of arguments, an .npz to write the results to.
"""

import sys
from typing import Any

import numpy as np

import jdet
from jdet.models.config import DecoderConfig
from jdet.models.decoder import Decoder
from jdet.sampling import SamplingArrays
from jdet.testing import tiny_config


def refuse(*args: Any) -> Any:
    raise AssertionError("the model was traced again")


def main(path: str, arguments: str, results: str) -> None:
    config = DecoderConfig.from_hf(tiny_config())
    model = jdet.random_model(config, dtype="bfloat16", implementation="portable")
    decoder_class: Any = Decoder
    decoder_class.__call__ = refuse
    given = np.load(arguments)
    sampling = SamplingArrays(*(given[name] for name in SamplingArrays._fields))
    found = jdet.export.load(path, model)(given["prompts"], given["lengths"], sampling)
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in found._asdict().items()}
    np.savez(results, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
