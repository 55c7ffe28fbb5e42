"""Decode and prefill steps compiled for TPUs that are not here: no sum is outside our kernels.

What is compiled is the whole step: embedding, layers (fewer of them, since they are equal), head
and greedy choice, at the widths and the vocabulary of the real models. That it compiles means that
every kernel fits VMEM and that Mosaic found a layout for every operation. Outside the kernels there
may be what `jdet.certify.hlo` knows to be harmless: movements, integers, and operations of
which the instruction alone fixes the result.
"""

import dataclasses
import functools

import pytest
from flax import nnx

import jdet
from jdet.models.config import CONFIGS
from jdet.models.decoder import Decoder
from jdet.testing.steps import step_shapes

LAYERS = 2
MODELS = {
    name: dataclasses.replace(CONFIGS[name], num_hidden_layers=LAYERS)
    for name in ("Qwen3-8B", "SmolLM2-135M")
}
KERNELS = {
    "jdet_rms_norm": 2 * LAYERS + 1,
    "jdet_matmul": 3 * LAYERS + 1,  # queries, keys and values; output; down; and the head
    "jdet_gated_matmul": LAYERS,
    "jdet_qkv_heads": LAYERS,
    "jdet_attention": LAYERS,
    "jdet_log_normalizer": 1,
}
# Kernels whose last dimension of the grid walks terms of a sum, not rows.
WALKS_TERMS = ("jdet_matmul", "jdet_gated_matmul", "jdet_log_normalizer")
# Of a core, MiB: what the compiler gave a kernel and what it keeps around it is within.
VMEM = {"v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}


@pytest.fixture(scope="module")
def step(compiled):
    """step(chip, model, implementation, batch, length): the program of a step."""

    @functools.cache
    def compile_step(chip, model, implementation, batch, length=1):
        # Decode: pages, as the engine has them.
        config = MODELS[model]
        decoder = nnx.eval_shape(lambda: Decoder(config, dtype="bfloat16", rngs=nnx.Rngs(0)))
        function, shapes = step_shapes(
            decoder,
            jdet.Ops(implementation),
            batch=batch,
            length=length,
            context=2048 if length == 1 else length,
            page_size=64 if length == 1 else None,
        )
        return compiled(chip, implementation, function, shapes, donate=2)  # the cache

    return compile_step


def check(chip, program):
    assert program.count == KERNELS
    assert [i.line[:200] for i in program.findings] == []
    assert 0 < max(k.vmem for k in program.kernels) <= VMEM[chip] * 2**20
    assert all(k.invariant_numerics for k in program.kernels)


def structure(program):
    """What is left of the kernels without the rows."""
    return [
        (k.name, k.floats, k.products, k.reduced, k.grid[-1] if k.name in WALKS_TERMS else None)
        for k in program.kernels
    ]


@pytest.mark.parametrize("model", MODELS)
def test_decode(step, chip, model):
    """At batch 1, 8 and 64: the same sums, in the same order, over the same terms."""
    programs = [step(chip, model, "mosaic_tpu", batch) for batch in (1, 8, 64)]
    for program in programs:
        check(chip, program)
    one, *others = (sorted(structure(program), key=str) for program in programs)
    assert [k for k in one if "tpu.matmul" in k[1]] and all(k[1] for k in one)
    for other in others:
        assert other == one
    # The batches were really there: what does follow them are rows.
    assert len({tuple(k.grid for k in p.kernels) for p in programs}) == 3


@pytest.mark.parametrize("model", MODELS)
def test_prefill(step, chip, model):
    check(chip, step(chip, model, "mosaic_tpu", 1, 2048))


def test_negative_control(step):
    """The same model left to plain XLA: dots, sums and exponentials of its own, by the batch."""
    found = step("v6e", "SmolLM2-135M", "xla", 8).findings
    assert {"convolution", "reduce", "exponential", "rsqrt"} <= {i.opcode for i in found}
