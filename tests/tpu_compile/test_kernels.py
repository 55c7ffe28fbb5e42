"""Each kernel compiled for each TPU where the steps do not go: float32, ragged sizes, options.

A compile checks that a kernel fits VMEM and that Mosaic finds a layout for every operation of it.
"""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import pytest

import jdet
from jdet.certify import without_tpu
from jdet.models.config import CONFIGS
from jdet.pallas_kernels.generations import GENERATIONS

OPS = jdet.Ops("mosaic_tpu", jdet.Contract(leaves=8))


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def attention(window, cap):
    def attend(q, k, v, positions, table):
        options = {"sliding_window": window, "soft_cap": cap}
        return OPS.attention(q, k, v, positions, page_table=table, **options)

    return attend


def attended(batch, length, heads, kv_heads, dim, dtype=jnp.bfloat16):
    """Of pages of 64 slots, 16 a row."""
    cache = shape(batch * 16, kv_heads, 64, dim, dtype=dtype)
    integers = shape(batch, length, dtype=jnp.int32), shape(batch, 16, dtype=jnp.int32)
    return shape(batch, length, heads, dim, dtype=dtype), cache, cache, *integers


def sharded(x, w):
    return OPS.matmul(x, w, k_sharded=True)


def norm(x, residual, weight):
    return OPS.rms_norm(x, weight, eps=1e-5, residual=residual)


F32 = jnp.float32
GROUPS = shape(8, dtype=jnp.int32)
# Name of the kernel, function, its arguments.
CASES = {
    "leaves": ("matmul", sharded, (shape(9, 1536), shape(577, 1536))),
    "float32, ragged": (
        "matmul",
        OPS.matmul,
        (shape(65, 577, dtype=F32), shape(49, 577, dtype=F32)),
    ),
    "gate, float32": (
        *("gated_matmul", OPS.gated_matmul),
        (shape(7, 576, dtype=F32), shape(3072, 576, dtype=F32)),
    ),
    "norm, float32": (
        *("rms_norm", norm),
        (shape(65, 577, dtype=F32), shape(65, 577, dtype=F32), shape(577, dtype=F32)),
    ),
    "odd vocabulary": ("log_normalizer", OPS.log_normalizer, (shape(9, 50257, dtype=F32),)),
    "window": ("attention", attention(300, None), attended(3, 1, 9, 3, 64)),
    "chunk, window and cap": ("attention", attention(300, 50.0), attended(1, 257, 8, 4, 256)),
    "float32": ("attention", attention(None, None), attended(2, 1, 8, 2, 128, F32)),
    "experts": (
        *("grouped_matmul", OPS.grouped_matmul),
        (shape(65, 768), shape(8, 2048, 768), GROUPS),
    ),
    "gated experts": (
        *("grouped_gated_matmul", OPS.grouped_gated_matmul),
        (shape(65, 2048), shape(8, 1536, 2048), GROUPS),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel(compiled, chip, case):
    name, function, arguments = CASES[case]
    program = compiled(chip, "mosaic_tpu", function, arguments)
    assert f"jdet_{name}" in program.count
    assert [i.line[:200] for i in program.findings] == []
    assert all(k.invariant_numerics for k in program.kernels)


def test_an_exported_program_compiles_where_it_is_loaded(tmp_path):
    """Saved without weights and without a TPU; what a TPU would load compiles for one."""
    config = dataclasses.replace(CONFIGS["SmolLM2-135M"], num_hidden_layers=1, vocab_size=1536)
    model = jdet.random_model(config, implementation="mosaic_tpu")
    sizes = {"batch_size": 2, "prompt_length": 16, "max_tokens": 8}
    path = tmp_path / "step.jdet"
    jdet.export.save(path, model, platform="tpu", **sizes)
    with pytest.raises(ValueError, match="platform tpu, here cpu"):
        jdet.export.load(path, model)
    program = jax.export.deserialize(bytearray(path.read_bytes().split(b"\n", 2)[2]))
    [topology] = [g.topology for g in GENERATIONS if g.name == "v6e"]
    given = without_tpu(topology)([shape(*a.shape, dtype=a.dtype) for a in program.in_avals])
    weights = len(jax.tree.leaves(model.decoder))
    lowered = jax.jit(program.call).lower(given[:weights], *given[weights:])
    assert "jdet_attention" in (lowered.compile().as_text() or "")
