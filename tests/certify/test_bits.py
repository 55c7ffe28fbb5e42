"""Bits compared: the first that differs, how far, and what is not a difference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdet.certify import assert_same_bits
from jdet.testing import bit_patterns, first_difference, ulp_distance

ONE_UP = np.nextafter(np.float32(1), np.float32(2))


def test_the_first_index_both_values_and_the_distance() -> None:
    a = np.zeros((2, 3), np.float32)
    a[1] = 1.0
    b = a.copy()
    b[1, 1], b[1, 2] = ONE_UP, 2.0
    found = first_difference(a, b)
    assert found is not None
    assert (found.index, found.ulps, found.max_ulps) == ((1, 1), 1, 2**23)
    assert (found.count, found.size, found.share) == (2, 6, 2 / 6)
    assert found.bits == ("0x3f800000", "0x3f800001")
    assert str(found) == (
        "first at index (1, 1): 0x3f800000 (1.0) against 0x3f800001 (1.0000001), 1 ULP; "
        "2 of 6 elements differ, by at most 8388608 ULP"
    )


def test_nan_equals_itself_and_the_zeros_differ() -> None:
    x = jnp.array([jnp.nan, 0.0, -jnp.inf])
    assert first_difference(x, x) is None
    found = first_difference(x, jnp.array([jnp.nan, -0.0, -jnp.inf]))
    assert found is not None and (found.index, found.ulps) == ((1,), 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_neighbouring_numbers_are_one_apart_across_zero(dtype: str) -> None:
    width = jnp.dtype(dtype).itemsize * 8
    unsigned = np.dtype(f"u{width // 8}")
    upwards = np.arange(1, 5, dtype=unsigned).view(jnp.dtype(dtype))
    downwards = (np.arange(1, 5) + (1 << (width - 1))).astype(unsigned).view(jnp.dtype(dtype))
    assert ulp_distance(upwards[:-1], upwards[1:]).tolist() == [1, 1, 1]
    assert ulp_distance(upwards, downwards).tolist() == [2, 4, 6, 8]


def test_scalars_integers_bools_complex_numbers_and_keys() -> None:
    found = first_difference(np.int8(-128), np.int8(127))
    assert found is not None and (found.index, found.ulps) == ((), 255)
    assert first_difference(True, True) is None
    found = first_difference(
        np.array([1 + 1j, 1], np.complex64), np.array([1 + 1j, 1 - 0j]).astype(np.complex64)
    )
    assert found is None or found.index == (1,)
    keys = jax.random.split(jax.random.key(0), 3)
    assert bit_patterns(keys).shape == (3, 2)
    found = first_difference(keys, keys[jnp.array([0, 2, 2])])
    assert found is not None and found.index[0] == 1


def test_other_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32\[2\] and float32\[3\] cannot have the same"):
        first_difference(np.zeros(2, np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="float32.* and float16"):
        first_difference(np.zeros(2, np.float32), np.zeros(2, np.float16))


def test_trees_name_the_array() -> None:
    tree = {"a": jnp.ones(2), "b": [jnp.zeros(3)]}
    assert_same_bits(tree, jax.tree.map(np.asarray, tree))
    with pytest.raises(AssertionError, match=r"array \['b'\]\[0\]: first at index \(2,\)"):
        assert_same_bits(tree, {"a": jnp.ones(2), "b": [jnp.array([0.0, 0.0, -0.0])]})
    with pytest.raises(AssertionError, match="other structures"):
        assert_same_bits(tree, {"a": jnp.ones(2)})
