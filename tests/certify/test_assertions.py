"""assert_batch_invariant: what it forms, what it catches, what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdet
from jdet.certify import BatchVariance, assert_batch_invariant, bisect

WIDTH = 256
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((3, WIDTH)), jnp.float32)
W = jnp.asarray(RNG.standard_normal((WIDTH, WIDTH)), jnp.float32)


def plain(x: jax.Array, w: jax.Array) -> dict[str, jax.Array]:
    return {"y": x @ w}


def ours(x: jax.Array, w: jax.Array) -> dict[str, jax.Array]:
    return {"y": jdet.Ops("portable").matmul(x, w)}


def test_jnp_fails_and_the_error_leads_to_the_operation() -> None:
    with pytest.raises(BatchVariance) as caught:
        assert_batch_invariant(plain, (X, W), batch_axes=(0, None), sizes=(1, 8))
    error = caught.value
    assert error.batch[0].shape == (8, WIDTH) and error.alone[0].shape == (1, WIDTH)
    assert "row 0 of a batch of 8" in str(error) and "result['y'] first at index" in str(error)
    assert "0x" in str(error) and "ULP" in str(error)
    found = bisect(plain, error.alone, error.batch, 0, error.row, batch_axes=(0, None))
    assert (found.kind, found.primitive) == ("operation", "dot_general")
    assert found.source.startswith(__file__)


def test_jdet_passes_where_jnp_fails() -> None:
    assert_batch_invariant(jdet.jit(ours), (X, W), batch_axes=(0, None), sizes=(1, 2, 8), seed=3)


def test_the_batches_are_formed_of_other_rows() -> None:
    seen: list[np.ndarray] = []

    def watched(x: jax.Array, keys: jax.Array) -> jax.Array:
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), x)
        return x + jax.vmap(lambda k: jax.random.normal(k, (WIDTH,)))(keys)

    keys = jax.random.split(jax.random.key(0), 3)
    assert_batch_invariant(watched, (X, keys), sizes=(5,))
    jax.effects_barrier()
    batches = [x for x in seen if len(x) == 5]
    rows = [[i for i in range(5) if (x[i] == np.asarray(X[0])).all()] for x in batches]
    assert all(len(found) == 1 for found in rows)
    assert {0, 4} <= {found[0] for found in rows}
    assert len(np.unique(np.concatenate(batches), axis=0)) > 5


def test_token_ids_stay_ids_of_the_argument() -> None:
    ids = jnp.array([[3, 5], [7, 3]])

    def lookup(ids: jax.Array, table: jax.Array) -> jax.Array:
        # An id that the argument does not hold would give NaN to all.
        return table[ids] + 0 * table[ids].sum()

    table = jnp.full((9, 4), jnp.nan).at[jnp.array([3, 5, 7])].set(1.0)
    assert_batch_invariant(lookup, (ids, table), batch_axes=(0, None), sizes=(4,))


def test_a_batch_that_is_not_formed_is_no_pass() -> None:
    with pytest.raises(AssertionError, match="no batch of 2 rows was formed: result has shape"):
        assert_batch_invariant(lambda x: x[:1], (X,), sizes=(2,))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sizes": (1,)}, "one of them 2 or more"),
        ({"sizes": (0, 2)}, "from 1 up"),
        ({"batch_axes": (0, 0)}, r"batch axes of sizes \[3, 256\]"),
        ({"batch_axes": (None, None)}, "no batch axis"),
        ({"batch_axes": (5, None)}, r"axis 5 of an array of shape \(3, 256\)"),
        ({"batch_axes": (0, None, 0)}, "does not fit"),
        ({"batch_axes": (0, None), "out_axes": None}, "no result has a batch axis"),
    ],
)
def test_bad_input(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        assert_batch_invariant(plain, (X, W), **given)
