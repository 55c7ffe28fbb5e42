"""What of a decode step is left to XLA on a GPU cannot change with the batch: seen in its program.

The decode step, with greedy sampling, is compiled for an H100 without one (`make
test-gpu-compile`), at several batch sizes, and its optimized HLO is read. Outside of the Mosaic
kernels there may be

- no dot, no convolution, no library's custom call, nothing by Triton but counts of integers;
- no reduction but those whose result no order can change: maxima, minima, and/or, the choice of
  an argmax, sums of integers;
- no scatter but one that overwrites (each row writes slots of its own), and no sort but by
  comparisons;
- beside them, instructions from a list: movements of data, and operations of which IEEE 754 or
  the instruction alone fixes the result of one element from that element's operands. No
  exponential, no logarithm, no square root: an emitter could choose a routine for these.

That is less than "the same fusions at every batch size", which does not hold: at batch 1 the
cache is written by a dynamic-update-slice, above it by a scatter, with other fusions around. It is
enough, if a fusion's instructions are compiled one by one. What could join two of them, a product
and the sum after it, shows in XLA's PTX: there is no fma in it.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jdet
from jdet.cache import create_cache
from jdet.certify.hlo import Module, parse
from jdet.decoding import DecodeState, decode
from jdet.models.config import CONFIGS, DecoderConfig
from jdet.models.decoder import Decoder
from jdet.sampling import SamplingParams, sampling_arrays
from jdet.testing import small_config

BATCHES = (1, 8, 64)
# The vocabulary is cut: the branch that sorts it takes minutes to compile at its real size.
VOCABULARY = 8192
MODELS = {
    "SmolLM2": DecoderConfig.from_hf(small_config(vocab_size=VOCABULARY)),
    "Qwen3-MoE": DecoderConfig.from_hf(small_config("qwen3_moe", vocab_size=VOCABULARY)),
    # Experts enough for the routing kernel.
    "Qwen3-30B-A3B": dataclasses.replace(
        CONFIGS["Qwen3-30B-A3B"], num_hidden_layers=2, vocab_size=VOCABULARY
    ),
    "Qwen3-8B": dataclasses.replace(
        CONFIGS["Qwen3-8B"], num_hidden_layers=2, vocab_size=VOCABULARY
    ),
    # Norms with float32 weights.
    "Gemma-3-270m": dataclasses.replace(
        CONFIGS["Gemma-3-270m"],
        num_hidden_layers=2,
        windows=(512, None),
        vocab_size=VOCABULARY,
    ),
}


def findings(hlo: str) -> list[str]:
    """The lines that a row's bits could follow the batch through."""
    return [i.line for i in Module(hlo).not_harmless()]


@pytest.fixture(scope="session")
def compiled(on_h100, tmp_path_factory):
    """compiled(model, batch, implementation): the optimized HLO, and XLA's own PTX."""

    @functools.cache
    def compile_step(model, batch, implementation):
        config, dump = MODELS[model], tmp_path_factory.mktemp(f"{model}-{batch}-{implementation}")

        def operands():
            integers = jnp.zeros(batch, jnp.int32)
            state = DecodeState(
                cache=create_cache(config, batch, 1024, jnp.bfloat16),
                prompt_lengths=integers,
                last_token=integers,
                count=integers,
                stopped=jnp.zeros(batch, bool),
                token_ids=jnp.zeros((batch, 16), jnp.int32),
                logprobs=jnp.zeros((batch, 16), jnp.float32),
            )
            return state, sampling_arrays([SamplingParams(temperature=0)] * batch), jnp.int32(4)

        decoder = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        options = {
            **jdet.compiler_options(implementation, "cuda"),
            "xla_dump_to": str(dump),
            "xla_dump_emitter_re": "ptx",
        }
        step = jax.jit(
            functools.partial(decode, ops=jdet.Ops(implementation)), compiler_options=options
        )
        arguments = on_h100((decoder, *jax.eval_shape(operands)))
        hlo = step.lower(*arguments).compile().as_text()
        return hlo, "".join(f.read_text() for f in dump.glob("*decode*.ptx"))

    return compile_step


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_left_to_xla_cannot_follow_the_batch(compiled, model, batch):
    hlo, _ = compiled(model, batch, "mosaic_gpu")
    opcodes = collections.Counter(i.opcode for i in parse(hlo))
    # Two layers of four matmuls, two norms and an attention; head, last norm, normalizer. The loop
    # over the looks and the one over the steps between two of them, which XLA must know the number
    # of; a loop or an unknown number in the step would make the device wait for the host.
    assert opcodes["custom-call"] >= 2 * 7 + 4 and opcodes["while"] == 2, opcodes
    assert hlo.count("known_trip_count") == 1 and 'known_trip_count":{"n":"8"}' in hlo
    assert findings(hlo) == []


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", MODELS)
def test_no_product_is_joined_with_a_sum(compiled, model, batch):
    _, ptx = compiled(model, batch, "mosaic_gpu")
    assert "mul.rn.f32" in ptx and "add.rn.f32" in ptx
    joined = re.compile(r"\bfma\.|\bmad\.\w+\.f(?:32|64)\b|\b(?:mul|add|sub)\.(?:ftz\.)?f32\b")
    assert [line for line in ptx.splitlines() if joined.search(line)] == []


def test_negative_control(compiled):
    """The same model left to plain XLA: dots by libraries, sums of floats, exponentials."""
    hlo, _ = compiled("SmolLM2", 8, "xla")
    found = "\n".join(findings(hlo))
    assert "custom-call" in found or " dot(" in found
    assert " reduce(" in found and " exponential(" in found
