"""What `jdet.batch_invariant` refuses, warns of, leaves alone and explains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.interpreters import mlir

import jdet

X = np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"implementation": "xla"}, "would replace nothing"),
        ({"implementation": "fast"}, "allowed: portable, mosaic_gpu"),
        ({"exclude": "exp"}, "sequence of names"),
        ({"contract": jdet.Contract(kv_split=64)}, "no effect here"),
    ],
)
def test_options_are_checked_before_anything_runs(options, said):
    with pytest.raises(ValueError, match=said):
        jdet.batch_invariant(jnp.exp, **options)


def test_what_is_no_function():
    with pytest.raises(TypeError, match="is not a function"):
        jdet.batch_invariant(3)  # pyright: ignore[reportArgumentType]


def test_exclude_leaves_alone_and_must_match():
    kept = jdet.batch_invariant(lambda x: jnp.exp(x).sum(), exclude=("exp",))
    text = str(jax.make_jaxpr(kept)(X))
    assert " exp " in text and "invariant_reduce_sum" in text and "invariant_exp" not in text
    with pytest.raises(ValueError, match="matches nothing.*it holds"):
        jdet.batch_invariant(jnp.exp, exclude=("dot_general",))(X)


def test_draws_are_named():
    def noisy(x):
        return x + jax.random.normal(jax.random.key(0), x.shape)

    with pytest.warns(UserWarning, match="random_bits.*test_api.*key of each row's own"):
        jdet.batch_invariant(noisy)(X)
    with pytest.raises(NotImplementedError, match="random_bits.*strict=True"):
        jdet.batch_invariant(noisy, strict=True)(X)


def test_callbacks_are_named():
    def called(x):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.warns(UserWarning, match="pure_callback.*jdet.certify.audit"):
        jdet.batch_invariant(called)(X)
    with pytest.raises(NotImplementedError, match="pure_callback"):
        jdet.batch_invariant(called, strict=True)(X)


def test_an_unknown_primitive_and_a_rule_for_it():
    primitive = core.Primitive("jdet_test_unknown")
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, lambda context, x: [x])
    with pytest.raises(NotImplementedError, match=r"register_rule\('jdet_test_unknown', None\)"):
        jax.jit(jdet.batch_invariant(primitive.bind))(X)
    jdet.register_rule(primitive, lambda x: x + 1)
    assert (jax.jit(jdet.batch_invariant(primitive.bind))(X) == 2).all()
    with pytest.raises(ValueError, match="rule for 'dot_general'"):
        jdet.register_rule("dot_general", None)


def test_explain_names_lines_and_computes_nothing():
    def f(x, w):
        return (x @ w).sum()

    shapes = jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 2), jnp.float32)
    found = jdet.batch_invariant.explain(f)(*shapes)
    made = {e.primitive: e for e in found.entries}
    assert made["dot_general"].choice.action == made["reduce_sum"].choice.action == "twin"
    assert "test_api.py" in made["dot_general"].source
    assert made["dot_general"].shapes == ("float32[3,4]", "float32[4,2]")
    assert "dot_general" in str(found) and "fixed tree over the contracted extent" in str(found)


def test_nested_jit_is_traced_once_and_keeps_its_name():
    @jax.jit
    def layer(x):
        return x @ np.eye(4, dtype=np.float32)

    text = str(jax.make_jaxpr(jdet.batch_invariant(lambda x: layer(layer(x))))(X))
    assert text.count("name=layer") == 2 and text.count("invariant_dot_general") == 1


def test_arrays_closed_over_donation_and_static_leaves():
    w = jnp.ones((4, 5))

    def f(options, x):
        return x @ w if options["on"] else x

    f = jdet.batch_invariant(f)
    assert f({"on": True}, X).shape == (3, 5)
    donating = jax.jit(lambda x: f({"on": False}, x) * 2, donate_argnums=0)
    given = jnp.ones((3, 4))
    assert (donating(given) == 2).all() and given.is_deleted()


@pytest.mark.parametrize("precision", ["BF16_BF16_F32_X3", "TF32_TF32_F32"])
def test_a_product_without_a_fixed_tree(precision):
    preset = jax.lax.DotAlgorithmPreset[precision]
    with pytest.raises(NotImplementedError, match=f"{precision}.*allowed: DEFAULT"):
        jdet.batch_invariant(lambda x: jnp.dot(x, x.T, precision=preset))(X)
