"""A warm-up for some sampling parameters compiles what requests with these need, and no more."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

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


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "not"])
def test_compiled_in_threads_nothing_is_left_to_compile(committed: bool) -> None:
    """Weights that were loaded are committed to a device; random ones are not."""
    config = dataclasses.replace(DecoderConfig.from_hf(tiny_config()), num_hidden_layers=1)
    model = jdet.random_model(config, contract=jdet.Contract(leaves=2, kv_split=128 << committed))
    if committed:
        decoder = jax.device_put(model.decoder, jax.devices()[0])
        model = dataclasses.replace(model, decoder=decoder)
    engine = Engine(model, EngineConfig(max_batch_size=2, max_tokens_per_step=18, max_model_len=64))
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    hot = SamplingParams(top_k=5, seed=1, max_tokens=3, prompt_logprobs=0, ignore_eos=True)
    jobs = engine.compile_jobs([greedy, hot])
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(job) for job in jobs]:
            done.result()
    assert engine.compiles == len(jobs)
    compiled: list[str] = []

    def seen(event: str, duration_secs: float, **_: str | int) -> None:
        compiled.extend([event] * event.endswith("backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
        engine.generate([[1, 2, 3], [4] * 30, [5]], [greedy, hot, hot], progress=False)
        assert engine.compiles == len(jobs) and compiled == []
        # Noise that truncates nothing is another program.
        engine.generate([[1]], dataclasses.replace(hot, top_k=0), progress=False)
        assert engine.compiles == len(jobs) + 1 and compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(seen)
