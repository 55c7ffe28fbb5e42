"""What XLA makes of `jdet.batch_invariant` for an H100: its program, and its own PTX."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

import jdet
from jdet.certify.hlo import parse


def attention(q, k, v, w):
    scores = jnp.einsum("BTHGD,BSHD->BHGTS", q, k) * 0.3
    weights = jax.nn.softmax(jnp.where(scores > -1, scores, -1e30), -1)
    x = jnp.einsum("BHGTS,BSHD->BTHGD", weights, v)
    x = (x * x - jnp.mean(x * x, -1, keepdims=True)) * 0.5 + x
    return jnp.einsum("BTHGD,HGDE->BTE", x, w)


@pytest.fixture(params=["float32", "bfloat16"])
def compiled(request, on_h100, tmp_path):
    """The optimized HLO, and XLA's own PTX, with the options that a plain `jax.jit` has."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, request.param)  # noqa: E731
    key = of(3, 136, 2, 64)
    example = of(3, 9, 2, 4, 64), key, key, of(2, 4, 64, 96)
    step = jax.jit(
        jdet.batch_invariant(attention, implementation="mosaic_gpu"),
        compiler_options={"xla_dump_to": str(tmp_path), "xla_dump_emitter_re": "ptx"},
    )
    hlo = step.lower(*on_h100(example)).compile().as_text()
    return hlo, "".join(path.read_text() for path in tmp_path.glob("*.ptx"))


def test_every_product_is_a_kernels(compiled):
    hlo, _ = compiled
    opcodes = collections.Counter(i.opcode for i in parse(hlo))
    assert opcodes["custom-call"] == 3, opcodes
    assert not {"dot", "convolution", "while"} & set(opcodes)
    assert "triton" not in hlo


def test_instructions_round_one_by_one(compiled):
    """No product is joined with a sum (`alone` relies on it); maxima are max.NaN (reductions)."""
    _, ptx = compiled
    found = re.findall(r"\b(?:add|sub|mul|max|min)\.(?:[\w.]*\.)?(?:f32|f16|bf16)(?:x2)?\b", ptx)
    assert {"add.rn.f32", "sub.rn.f32", "mul.rn.f32"} < set(found)
    assert all(re.match(r"(add|sub|mul)\.rn\.f32|max\.NaN", opcode) for opcode in found), found
    # An exponential has fmas of its own: three, and one that rounds down.
    joined = len(re.findall(r"\bfma\.rn\.f32\b", ptx))
    assert joined == 3 * len(re.findall(r"\bex2\.approx", ptx))
