"""RoPE: right against float64, and the same bits in any batch and at any place in a prompt."""

import jax.numpy as jnp
import numpy as np
import pytest

LONGEST = 700


@pytest.fixture(scope="module")
def table():
    """table(dim): cosines and sines of Llama's angles, theta 1e5, as a decoder makes them."""

    def angles(dim):
        frequency = 1e5 ** (-np.arange(0, dim, 2) / dim)
        angle = np.arange(LONGEST)[:, None] * frequency
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    return angles


@pytest.mark.parametrize(("heads", "dim"), [(9, 64), (2, 128)])
def test_right(op, implementation, dtype, heads, dim, normal, table):
    x = normal(0, (2, 3, heads, dim), dtype)
    positions = np.array([[0, 1, 2], [255, 256, 699]], np.int32)
    cos, sin = table(dim)
    y = op("rope", implementation)(x, cos, sin, positions)
    assert y.shape == x.shape and y.dtype == dtype
    # As a rotation of complex numbers: pair i is (x[i], x[i + dim / 2]).
    x64 = x.astype(np.float64)
    turn = (cos.astype(np.float64) + 1j * sin)[positions][:, :, None]
    want = (x64[..., : dim // 2] + 1j * x64[..., dim // 2 :]) * turn
    want = np.concatenate([want.real, want.imag], axis=-1)
    size = np.linalg.norm(np.stack(np.split(x64, 2, axis=-1)), axis=0)
    tolerance = 2 * np.finfo(np.float32).eps * np.concatenate([size, size], axis=-1)
    tolerance += float(jnp.finfo(dtype).eps) / 2 * abs(want)
    assert (abs(np.asarray(y).astype(np.float64) - want) <= tolerance).all()


def test_position_zero_turns_nothing(op, implementation, dtype, normal, table, assert_same_bits):
    """So does a padded query, position -1: it reads the table's first row, never its last."""
    x = normal(0, (1, 2, 9, 64), dtype)
    y = op("rope", implementation)(x, *table(64), np.array([[0, -1]], np.int32))
    assert_same_bits(y, x)


def test_row_does_not_follow_the_batch(
    op, invariant, dtype, rows, normal, table, assert_rows_alike
):
    x = normal(0, (300, 1, 9, 64), dtype)
    positions = np.arange(300, dtype=np.int32)[:, None] * 7 % LONGEST
    rope, (cos, sin) = op("rope", invariant), table(64)
    assert_rows_alike(lambda x, at: rope(x, cos, sin, at), (x, positions), rows)


def test_token_does_not_follow_the_prompt(
    op, invariant, dtype, few_rows, normal, table, assert_rows_alike
):
    x = normal(0, (300, 9, 64), dtype)
    positions = np.arange(300, dtype=np.int32)
    rope, (cos, sin) = op("rope", invariant), table(64)
    assert_rows_alike(lambda x, at: rope(x[None], cos, sin, at[None])[0], (x, positions), few_rows)


def test_neighbours_of_nan(op, invariant, dtype, normal, table, assert_same_bits):
    x = normal(0, (5, 1, 9, 64), dtype)
    among = np.full_like(x, np.nan)
    among[3] = x[3]
    positions = np.full((5, 1), 321, np.int32)
    rope, (cos, sin) = op("rope", invariant), table(64)
    assert_same_bits(rope(among, cos, sin, positions)[3], rope(x, cos, sin, positions)[3])


def test_runs_twice_alike(op, invariant, dtype, normal, table, assert_same_bits):
    x = normal(0, (5, 1, 9, 64), dtype)
    positions = np.full((5, 1), 321, np.int32)
    rope, (cos, sin) = op("rope", invariant), table(64)
    assert_same_bits(rope(x, cos, sin, positions), rope(x, cos, sin, positions))
