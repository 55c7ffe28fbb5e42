"""A model on the TPU kernels, in Pallas' simulator: decode is prefill, alone or in a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jdet
from jdet.cache import create_cache
from jdet.decoding import Group
from jdet.models.config import DecoderConfig
from jdet.testing import small_config

LENGTH, SLOTS = 12, 256


@pytest.fixture(scope="module")
def logits():
    """logits(tokens, positions): [B, T, V] of one layer with SmolLM2's widths, a step at a time."""
    config = DecoderConfig.from_hf(small_config("llama", layers=1, vocab_size=256))
    model = jdet.random_model(config, dtype="bfloat16", implementation="mosaic_tpu")

    @jax.jit
    def step(tokens, positions, cache):
        hidden, cache = model.decoder((Group(tokens, positions),), cache, model.ops)
        return model.decoder.logits(hidden[0], model.ops), cache

    def run(tokens, cuts):
        """The logits of tokens [B, T], read in steps that end at `cuts`."""
        cache = create_cache(config, tokens.shape[0], SLOTS, jnp.bfloat16, jnp.nan)
        outs, start = [], 0
        for stop in cuts:
            at = np.broadcast_to(
                np.arange(start, stop, dtype=np.int32), (len(tokens), stop - start)
            )
            out, cache = step(jnp.asarray(tokens[:, start:stop]), jnp.asarray(at), cache)
            outs.append(np.asarray(out))
            start = stop
        return np.concatenate(outs, axis=1)

    with pltpu.force_tpu_interpret_mode():
        # Two thirds of the time to compile, and the CPU's code is not what is tested.
        jax.config.update("jax_disable_most_optimizations", True)
        yield run
        jax.config.update("jax_disable_most_optimizations", False)


def test_a_request_has_one_set_of_bits(logits):
    tokens = np.random.default_rng(0).integers(0, 256, (3, LENGTH)).astype(np.int32)
    whole = logits(tokens, (LENGTH,))
    assert np.isfinite(whole).all()
    alone = logits(tokens[1:2], (LENGTH - 1, LENGTH))
    np.testing.assert_array_equal(alone[0].view(np.int32), whole[1].view(np.int32))
