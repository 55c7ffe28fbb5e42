"""A warm-up for some sampling parameters compiles what requests with these need, and no more."""

import dataclasses

import jdet
from jdet import Engine, EngineConfig, SamplingParams
from jdet.models.config import DecoderConfig
from jdet.testing import tiny_config


def test_what_greedy_requests_need_is_compiled_and_nothing_else() -> None:
    config = dataclasses.replace(DecoderConfig.from_hf(tiny_config()), num_hidden_layers=1)
    # A contract of its own: programs are shared by engines with the same ops.
    model = jdet.random_model(config, contract=jdet.Contract(leaves=4))
    engine = Engine(model, EngineConfig(max_batch_size=2, max_tokens_per_step=18, max_model_len=64))
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    engine.warm_up([greedy])
    compiled = engine.compiles
    engine.generate([[1, 2, 3], [4] * 30], greedy, progress=False)
    assert engine.compiles == compiled
    engine.generate([[1, 2, 3]], dataclasses.replace(greedy, temperature=1.0), progress=False)
    assert engine.compiles > compiled
