"""audit: what a compiled function leaves to shapes, by the line that asked for it."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jdet
from jdet.certify import Audit, audit

WIDTH = 256
SIZES = (1, 8, 33)
OPTIONS = jdet.compiler_options()


def of(fn: Callable[..., Any], dtype: str = "float32", **kwargs: Any) -> Audit:
    def arguments(n: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return jax.ShapeDtypeStruct((n, WIDTH), dtype), jax.ShapeDtypeStruct((WIDTH, WIDTH), dtype)

    return audit(fn, arguments, SIZES, **{"compiler_options": OPTIONS, **kwargs})


def only(found: Audit) -> Any:
    assert not found.certified
    [finding] = found.findings
    assert finding.source.startswith(__file__) and "<locals>" not in finding.why
    return finding


def test_a_product_left_to_a_library() -> None:
    finding = only(of(lambda x, w: x @ w, "float32"))
    assert (finding.kind, finding.op) == ("product", "dot_general")
    assert "jdet.Ops().matmul" in finding.instead
    assert set(finding.lowerings) == set(SIZES) and 33 in finding.changes + (33,)
    assert all("over 256" in how for n in SIZES[1:] for how in finding.lowerings[n])


def test_a_sum_that_is_cut_by_the_number_of_rows() -> None:
    """At up to 8 rows XLA:CPU sums 32 at a time, at 33 YNNPACK sums the row."""
    finding = only(of(lambda x, w: x * jnp.mean(x * x, -1, keepdims=True)))
    assert (finding.kind, finding.op, finding.changes) == ("sum", "reduce_sum", (33,))


def test_a_rounding_that_is_dropped() -> None:
    def rounded(x: jax.Array, w: jax.Array) -> jax.Array:
        return (x @ w).astype(jnp.float32) * 3

    kinds = [f.kind for f in of(rounded, "bfloat16", compiler_options=None).findings]
    assert kinds == ["product", "rounding"]
    assert [f.kind for f in of(rounded, "bfloat16").findings] == ["product"]


@pytest.mark.parametrize(
    ("kind", "op", "fn"),
    [
        ("batch", "reduce_max", lambda x, w: x / jnp.max(jnp.abs(x))),
        ("scatter", "scatter-add", lambda x, w: w.at[jnp.argmax(x, -1)].add(x)),
        (
            "sort",
            "sort",
            lambda x, w: jax.lax.sort(
                (x, jnp.broadcast_to(jnp.arange(WIDTH), x.shape)), num_keys=1, is_stable=False
            ),
        ),
        ("custom call", "pure_callback", lambda x, w: jax.pure_callback(lambda v: v, x, x)),
    ],
)
def test_what_is_named(kind: str, op: str, fn: Callable[..., Any]) -> None:
    finding = only(of(fn))
    assert (finding.kind, finding.op) == (kind, op), finding


def test_jdet_ops_and_elementwise_code_are_certified() -> None:
    ops = jdet.Ops("portable")

    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        normed, residual = ops.rms_norm(x, w[0], eps=1e-5)
        merged = residual + ops.matmul(normed, w) * 2
        stable = jax.lax.sort((merged, jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)), num_keys=1)
        return ops.log_softmax(stable[0]).astype(x.dtype) + jnp.max(merged, -1, keepdims=True)

    found = of(layer, "bfloat16")
    assert found.certified, str(found)
    assert found.verdict == "CERTIFIED at batch sizes 1, 8, 33 on cpu"
    assert sum(found.ours.values()) >= 1 and all("portable.py" in s for s in found.ours)
    # The same ops on plain XLA are the user's code's own faults, or the library's: not ours.
    plain = jdet.Ops("xla")
    control = of(lambda x, w: plain.matmul(x, w))
    assert not control.certified and control.ours == {}


def test_table_and_json() -> None:
    found = of(lambda x, w: x @ w)
    told = json.loads(found.to_json())
    assert told["verdict"] == "1 can make a row follow the batch, at batch sizes 1, 8, 33 on cpu"
    assert told["findings"][0]["op"] == "dot_general" and told["sizes"] == list(SIZES)
    assert "dot_general" in str(found) and found.verdict in " ".join(str(found).split())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="two different batch sizes or more"):
        audit(lambda x: x, lambda n: (jnp.ones(n),), (8, 8))
    with pytest.raises(
        ValueError, match="cannot be compiled at batch size 8: TypeError: .*; two sizes"
    ):
        audit(lambda x: x.reshape(3, 1), lambda n: (jnp.ones(3 if n == 3 else n),), (3, 8))
    with pytest.raises(ValueError, match="at batch size 1: TracerBool.*; at batch size 8: Tracer"):
        audit(lambda x: x if x[0] > 0 else -x, lambda n: (jnp.ones(n),), (1, 8))


def test_a_size_that_does_not_fit_does_not_hide_the_others() -> None:
    """As a device would that has no room for the largest one."""
    found = audit(lambda x: x.reshape(-1, 2) + 1, lambda n: (jnp.ones(n),), (2, 8, 9))
    assert found.sizes == (2, 8) and list(found.failed) == [9] and not found.certified
    assert "batch size 9 could not be compiled: TypeError" in str(found)
    assert found.verdict.endswith("not compiled at 9") and json.loads(found.to_json())["failed"]
