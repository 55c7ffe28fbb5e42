"""What XLA:CPU makes of twins under `jdet.batch_invariant`: loops that LLVM can vectorize."""

import re

import jax
import numpy as np
import pytest

import jdet


def attended(scores, values):
    return jax.nn.softmax(scores) @ values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pad_computes_no_exponential_and_writes_no_flat_view(dtype):
    """Either is a loop of 10 ns an element: a branch in it, or divisions that find its place."""
    example = np.ones((2, 37, 197), dtype), np.ones((2, 197, 24), dtype)
    compiled = jax.jit(jdet.batch_invariant(attended)).lower(*example).compile()
    computations = re.split(r"^}", compiled.as_text() or "", flags=re.MULTILINE)
    pads = [text for text in computations if " pad(" in text]
    assert pads
    for text in pads:
        assert " floor(" not in text
        assert not re.search(r"ROOT \S+ = \w+\[\d+\]\S* bitcast\(", text)
