"""Embedding: rows of the table and nothing else, in any batch."""

import numpy as np
import pytest

from jdet.compiler import jit
from jdet.pallas_kernels import implementation_of


@pytest.fixture(scope="module")
def table(normal):
    """table(dtype): 1000 tokens of SmolLM2's width."""
    return lambda dtype: normal(0, (1000, 576), dtype)


def test_right(op, implementation, dtype, table, assert_same_bits):
    tokens = np.array([[0, 999, 7], [7, 500, 0]], np.int32)
    y = op("embed", implementation)(tokens, table(dtype))
    assert_same_bits(y, table(dtype)[tokens])


def test_scale_is_rounded_before_the_product(op, implementation, dtype, table, assert_same_bits):
    """As Gemma does it: in bfloat16 sqrt(576 * 5) = 53.67 is 53.75."""
    tokens, scale = np.array([0, 999, 7], np.int32), (576 * 5) ** 0.5
    y = op("embed", implementation)(tokens, table(dtype), scale=scale)
    rounded = np.asarray(scale, dtype).astype(np.float32)
    assert (rounded == 53.75) == (dtype.itemsize == 2)
    assert_same_bits(y, (table(dtype)[tokens].astype(np.float32) * rounded).astype(dtype))


def test_scaled_row_does_not_follow_what_is_added(op, invariant, table, assert_same_bits):
    """The product is rounded before a residual is added, in one program as in two."""
    rows = table(np.dtype("float32"))
    tokens = np.arange(300, dtype=np.int32)
    embed = implementation_of("embed", invariant)
    together = jit(lambda t, r: embed(t, r, scale=9.3) + r[:300], implementation=invariant)
    apart = op("embed", invariant)(tokens, rows, scale=9.3) + rows[:300]
    assert_same_bits(together(tokens, rows), apart)


@pytest.mark.parametrize("token", [1000, 2**31 - 1, -1, -1000, -1001, -(2**31)])
def test_token_outside_the_table_gives_nan(op, implementation, dtype, table, token):
    y = op("embed", implementation)(np.array([3, token], np.int32), table(dtype))
    y = np.asarray(y).astype(np.float32)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


def test_row_does_not_follow_the_batch(op, invariant, dtype, rows, table, assert_rows_alike):
    tokens = np.arange(300, dtype=np.int32) * 13 % 1000
    embed, weights = op("embed", invariant), table(dtype)
    assert_rows_alike(lambda tokens: embed(tokens, weights), (tokens,), rows)


def test_neighbours_of_nan(op, invariant, dtype, table, assert_same_bits):
    embed, weights = op("embed", invariant), table(dtype)
    tokens = np.full(9, 1000, np.int32)
    tokens[4] = 123
    assert_same_bits(embed(tokens, weights)[4], weights[123])


def test_runs_twice_alike(op, invariant, dtype, table, assert_same_bits):
    embed, weights = op("embed", invariant), table(dtype)
    tokens = np.arange(9, dtype=np.int32)
    assert_same_bits(embed(tokens, weights), embed(tokens, weights))
