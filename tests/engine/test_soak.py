"""Random loads on a tiny model, and the number of programs they need."""

import functools

import jdet
from jdet.engine.config import EngineConfig
from jdet.engine.engine import Engine
from jdet.models.config import DecoderConfig
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams
from jdet.testing import soak, tiny_config

CONFIG = EngineConfig(
    max_batch_size=6,
    max_tokens_per_step=38,
    max_model_len=256,
    page_size=16,
    num_pages=20,
    chunk_sizes=(16, 32),
)


@functools.cache
def model(implementation: str = "portable") -> LanguageModel:
    config = DecoderConfig.from_hf(tiny_config())
    return jdet.random_model(config, dtype="bfloat16", implementation=implementation)


def test_after_warm_up_nothing_is_compiled_and_a_random_load_gives_the_solo_bits() -> None:
    engine = Engine(model(), CONFIG)
    engine.warm_up()
    compiled = engine.compiles
    found = soak(model(), CONFIG, requests=200, seed=1)
    assert found.mismatches == []
    assert engine.compiles == compiled > 0
    assert found.cancelled >= 3
    assert found.counts.preemptions >= 3
    assert found.counts.reused_tokens >= 1000
    assert found.counts.unfinished_chunks >= 200
    assert found.counts.mixed_steps >= 200
    assert found.counts.most_decodes == 6


def test_plain_xla_fails_the_same_comparison() -> None:
    found = soak(model("xla"), CONFIG, requests=20, seed=1)
    assert found.mismatches


def test_the_last_page_serves_a_request_of_the_greatest_length() -> None:
    """The longest request fits exactly, beside others that must give way."""
    engine = Engine(model(), CONFIG)
    prompts = [[i + 1] * n for i, n in enumerate((200, 30, 30, 30))]
    params = [SamplingParams(temperature=0, max_tokens=m) for m in (56, 40, 40, 40)]
    assert [len(c.token_ids) for c in engine.generate(prompts, params)] == [56, 40, 40, 40]
