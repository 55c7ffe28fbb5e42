"""Dispatch and checks: an error that names both sides; never another implementation."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jdet import pallas_kernels
from jdet.contract import Contract
from jdet.ops import Ops, checks, default_implementation
from jdet.pallas_kernels.generations import GENERATIONS
from jdet.pallas_kernels.route import Routing


def zeros(*shape, dtype=jnp.float32):
    """What the checks look at: a shape and a dtype."""
    return jnp.zeros(shape, dtype)


BFLOAT16 = jnp.bfloat16
WRONG_MATMUL = {
    "other K": ((zeros(5, 8), zeros(3, 4), None, 1), r"x \(5, 8\) and w \(3, 4\).*K=8"),
    "weights of rank 3": ((zeros(5, 8), zeros(1, 3, 8), None, 1), r"w \(1, 3, 8\)"),
    "other dtype": ((zeros(5, 8), zeros(3, 8, dtype=BFLOAT16), None, 1), "float32.*bfloat16"),
    "bias of K": ((zeros(5, 8), zeros(3, 8), zeros(8), 1), r"bias \(8,\); must be \(3,\)"),
    "leaves": ((zeros(5, 12), zeros(3, 12), None, 8), "K=12 .* 8 equal leaves"),
}
WRONG_GATED_MATMUL = {
    "other K": ((zeros(5, 8), zeros(6, 4)), r"x \(5, 8\) and w \(6, 4\).*K=8"),
    "no second half": ((zeros(5, 8), zeros(3, 8)), r"w \(3, 8\); w must be \[2 F"),
    "other dtype": ((zeros(5, 8), zeros(6, 8, dtype=BFLOAT16)), "float32.*bfloat16"),
    "activation": ((zeros(5, 8), zeros(6, 8), "gelu"), "'gelu'; allowed: silu, gelu_tanh"),
}
SIZES = zeros(3, dtype=jnp.int32)
WRONG_GROUPED_MATMUL = {
    "other K": (
        (zeros(5, 8), zeros(3, 2, 4), SIZES, 1),
        r"x \(5, 8\) and w \(3, 2, 4\).*\[E, N, K\]",
    ),
    "one expert's weights": ((zeros(5, 8), zeros(3, 8), SIZES, 1), r"w \(3, 8\).*\[E, N, K\]"),
    "other dtype": (
        (zeros(5, 8), zeros(3, 2, 8, dtype=BFLOAT16), SIZES, 1),
        "float32.*bfloat16",
    ),
    "sizes of others": (
        (zeros(5, 8), zeros(4, 2, 8), SIZES, 1),
        r"int32\(3,\); must be int32\(4,\)",
    ),
    "sizes as floats": (
        (zeros(5, 8), zeros(3, 2, 8), zeros(3), 1),
        r"float32\(3,\); must be int32",
    ),
    "leaves": ((zeros(5, 12), zeros(3, 2, 12), SIZES, 8), "K=12 .* 8 equal leaves"),
}
WRONG_GROUPED_GATED_MATMUL = {
    "other K": ((zeros(5, 8), zeros(3, 2, 4), SIZES), r"x \(5, 8\).*\[E, 2 F, K\]"),
    "no second half": ((zeros(5, 8), zeros(3, 3, 8), SIZES), r"w \(3, 3, 8\); must be \[E, 2 F"),
    "tokens": ((zeros(5, 8), zeros(3, 2, 8), SIZES, zeros(9)), r"tokens float32\(9,\); int32\[R\]"),
}
EVERY = zeros(5, dtype=bool)
WRONG_ROUTE = {
    "tokens": ((zeros(4, 8), EVERY, 2), r"logits \(4, 8\) and routed \(5,\)"),
    "no experts": ((zeros(5, 8), EVERY, 0), "k=0 of 8 experts; allowed: 1 to 8"),
    "too many": ((zeros(5, 8), EVERY, 9), "k=9 of 8 experts"),
}
ROUTING = Routing(
    zeros(5, 2, dtype=jnp.int32),
    zeros(5, 2),
    zeros(10, dtype=jnp.int32),
    zeros(5, 2, dtype=jnp.int32),
    SIZES,
)
WRONG_EXPERT_SUM = {"rows": ((zeros(5, 8), ROUTING), r"y \(5, 8\); must be \[R=10, D\]")}
WRONG_EXPERT_NORM = {
    "rows": ((zeros(5, 8), ROUTING, zeros(8), zeros(5, 8)), r"y \(5, 8\); must be \[R=10, D\]"),
    "tokens": (
        (zeros(10, 8), ROUTING, zeros(8), zeros(4, 8)),
        r"residual float32\(4, 8\); must be",
    ),
    "weight": ((zeros(10, 8), ROUTING, zeros(4), zeros(5, 8)), r"weight \(4,\)"),
}
WRONG_RMS_NORM = {
    "weight": ((zeros(5, 8), zeros(4), None), r"x \(5, 8\) and weight \(4,\)"),
    "residual": ((zeros(5, 8), zeros(8), zeros(4, 8)), r"\(5, 8\).*residual \(4, 8\)"),
    "residual dtype": ((zeros(5, 8), zeros(8), zeros(5, 8, dtype=BFLOAT16)), "float32.*bfloat16"),
}
WRONG_ROPE = {
    "odd head": ((zeros(1, 1, 1, 7), zeros(9, 3), zeros(9, 3)), r"x \(1, 1, 1, 7\)"),
    "table of the whole head": ((zeros(1, 1, 1, 8), zeros(9, 8), zeros(9, 8)), r"cos \(9, 8\)"),
    "sine of another table": ((zeros(1, 1, 1, 8), zeros(9, 4), zeros(8, 4)), r"sin \(8, 4\)"),
}
HEADS = {
    "qkv": zeros(2, 3, 8 * 8),
    "q_norm": zeros(8),
    "k_norm": None,
    "cos": zeros(2, 3, 4),
    "sin": zeros(2, 3, 4),
    "positions": zeros(2, 3, dtype=jnp.int32),
    "k": zeros(2, 2, 32, 8),
    "v": zeros(2, 2, 32, 8),
    "page_table": None,
}


def heads(**other):
    """The arguments of check_qkv_heads, some replaced."""
    return tuple({**HEADS, **other}.values())


HEAD_PAGES = {"k": zeros(9, 2, 16, 8), "v": zeros(9, 2, 16, 8)}
WRONG_QKV_HEADS = {
    "values of another length": (heads(v=zeros(2, 2, 16, 8)), r"v_cache \(2, 2, 16, 8\)"),
    "cache of another dtype": (
        heads(k=HEADS["k"].astype(BFLOAT16), v=HEADS["v"].astype(BFLOAT16)),
        "bfloat16.*qkv's float32",
    ),
    "no query heads": (heads(qkv=zeros(2, 3, 4 * 8)), r"qkv \(2, 3, 32\).* 2 of keys"),
    "part of a head": (heads(qkv=zeros(2, 3, 60)), r"qkv \(2, 3, 60\).* query heads of 8"),
    "norm": (heads(k_norm=zeros(4)), r"k_norm \(4,\); must be \(8,\)"),
    "table of the whole head": (heads(cos=zeros(2, 3, 8)), r"cos \(2, 3, 8\).*\(2, 3, 4\)"),
    "angles of a table": (heads(sin=zeros(9, 4)), r"sin \(9, 4\); must be \(2, 3, 4\)"),
    "positions": (heads(positions=zeros(2, 2)), r"positions \(2, 2\); must be \(2, 3\)"),
    "other batch": (heads(**HEAD_PAGES), "a cache of 9 rows for 2 rows"),
    "pages of another batch": (
        heads(**HEAD_PAGES, page_table=zeros(3, 4)),
        r"page_table \(3, 4\) for 2 rows",
    ),
}
Q, KV, AT = zeros(2, 3, 4, 8), zeros(2, 2, 32, 8), zeros(2, 3, dtype=jnp.int32)
PAGED = zeros(5, 2, 16, 8)
WRONG_ATTENTION = {
    "values of another length": ((Q, KV, KV[:, :, :16], AT, 16), r"v_cache \(2, 2, 16, 8\)"),
    "other batch": ((Q[:1], KV, KV, AT[:1], 16), r"q \(1, 3, 4, 8\), k_cache \(2, 2, 32, 8\)"),
    "other head size": ((Q[..., :4], KV, KV, AT, 16), r"q \(2, 3, 4, 4\)"),
    "heads": ((Q[:, :, :3], KV, KV, AT, 16), "3 query heads over 2 key heads"),
    "positions": ((Q, KV, KV, AT[:, :2], 16), r"positions \(2, 2\); must be \(2, 3\)"),
    "cache": ((Q, KV[:, :, :24], KV[:, :, :24], AT, 16), "24 slots .* kv_split=16"),
    "pages": ((Q, PAGED, PAGED, AT, 24, AT), "pages of 16 slots.* kv_split=24"),
    "rows of the table": ((Q, PAGED, PAGED, AT, 16, AT[:1]), "each of 2 rows"),
    "int16": ((Q, PAGED, PAGED, AT, 16, AT.astype(jnp.int16)), "page_table int16"),
    "table": ((Q, PAGED, PAGED, AT, 16, AT[0]), r"page_table int32\(3,\)"),
}
WRONG_SCORES = {
    "scale": ((0.0, None, None), "scale=0.0; must be a positive number"),
    "no number": ((jnp.float32(1), None, None), "scale=Array.* positive number"),
    "window of none": ((None, 0, None), "sliding_window=0; must be an int of 1 or more"),
    "window of half a key": ((None, 2.5, None), "sliding_window=2.5; must be an int"),
    "window switched on": ((None, True, None), "sliding_window=True; must be an int"),
    "cap": ((None, None, -50.0), "soft_cap=-50.0; must be a positive number"),
    "no cap": ((None, None, float("inf")), "soft_cap=inf; must be a positive number"),
}


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        pytest.param(getattr(checks, f"check_{op}"), *case, id=f"{op}: {name}")
        for op, cases in {
            "matmul": WRONG_MATMUL,
            "gated_matmul": WRONG_GATED_MATMUL,
            "grouped_matmul": WRONG_GROUPED_MATMUL,
            "grouped_gated_matmul": WRONG_GROUPED_GATED_MATMUL,
            "route": WRONG_ROUTE,
            "expert_norm": WRONG_EXPERT_NORM,
            "expert_sum": WRONG_EXPERT_SUM,
            "rms_norm": WRONG_RMS_NORM,
            "rope": WRONG_ROPE,
            "qkv_heads": WRONG_QKV_HEADS,
            "attention": WRONG_ATTENTION,
        }.items()
        for name, case in cases.items()
    ],
)
def test_check_names_both_sides(check, arguments, message):
    with pytest.raises(ValueError, match=f"^{check.__name__.removeprefix('check_')}: .*{message}"):
        check(*arguments)


@pytest.mark.parametrize(("arguments", "message"), WRONG_SCORES.values(), ids=WRONG_SCORES)
def test_check_of_scores(arguments, message):
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        checks.check_scores(*arguments)


def test_checks_let_pass_what_fits():
    checks.check_scores(None, None, None)
    checks.check_scores(1, 1, 50)
    checks.check_matmul(zeros(2, 5, 16), zeros(3, 16), zeros(3), 8)
    checks.check_gated_matmul(zeros(2, 5, 16), zeros(6, 16))
    checks.check_grouped_matmul(zeros(5, 16), zeros(3, 2, 16), SIZES, 8)
    checks.check_grouped_gated_matmul(zeros(5, 16), zeros(3, 2, 16), SIZES)
    checks.check_route(zeros(5, 8), EVERY, 8)
    checks.check_expert_norm(zeros(10, 8), ROUTING, zeros(8), zeros(5, 8))
    checks.check_expert_sum(zeros(10, 8), ROUTING)
    checks.check_rms_norm(zeros(2, 5, 16), zeros(16), zeros(2, 5, 16))
    checks.check_rope(zeros(1, 1, 1, 8), zeros(9, 4), zeros(9, 4))
    checks.check_qkv_heads(*heads())
    checks.check_qkv_heads(*heads(**HEAD_PAGES, page_table=zeros(2, 4)))
    checks.check_attention(Q, KV, KV, AT, 16)
    checks.check_attention(Q, PAGED, PAGED, AT, 32, zeros(2, 3, dtype=jnp.int32))


def test_rows_that_cannot_be_numbered_are_refused():
    logits, routed = (jax.ShapeDtypeStruct((2**24, *more), jnp.float32) for more in ((128,), ()))
    with pytest.raises(ValueError, match="16777216 tokens of 8 experts; at most"):
        jax.eval_shape(lambda logits, routed: checks.check_route(logits, routed, 8), logits, routed)


def test_ops_check_before_they_compute():
    """Each method calls its check; with faults that the types of its arguments let pass."""
    ops = Ops(contract=Contract(leaves=8, kv_split=16))
    with pytest.raises(ValueError, match="^matmul: "):
        ops.matmul(zeros(5, 12), zeros(3, 12), k_sharded=True)
    with pytest.raises(ValueError, match="^gated_matmul: "):
        ops.gated_matmul(zeros(5, 8), zeros(3, 8))
    with pytest.raises(ValueError, match="^grouped_matmul: "):
        ops.grouped_matmul(zeros(5, 12), zeros(3, 2, 12), SIZES, k_sharded=True)
    with pytest.raises(ValueError, match="^grouped_gated_matmul: "):
        ops.grouped_gated_matmul(zeros(5, 8), zeros(3, 3, 8), SIZES)
    with pytest.raises(ValueError, match="^route: "):
        ops.route(zeros(5, 8), EVERY, k=9, normalise=True)
    with pytest.raises(ValueError, match="^expert_norm: "):
        ops.expert_norm(zeros(5, 8), ROUTING, zeros(8), eps=1e-5, residual=zeros(5, 8))
    with pytest.raises(ValueError, match="^expert_sum: "):
        ops.expert_sum(zeros(5, 8), ROUTING)
    with pytest.raises(ValueError, match="^rms_norm: "):
        ops.rms_norm(zeros(5, 8), zeros(8), eps=1e-5, residual=zeros(5, 8, dtype=BFLOAT16))
    with pytest.raises(ValueError, match="^rope: "):
        ops.rope(zeros(1, 1, 1, 7), zeros(9, 3), zeros(9, 3), zeros(1, 1, dtype=jnp.int32))
    with pytest.raises(ValueError, match="^qkv_heads: "):
        ops.qkv_heads(*heads(qkv=zeros(2, 3, 60))[:-1], eps=1e-5)
    with pytest.raises(ValueError, match="^attention: "):
        ops.attention(Q, KV[:, :, :24], KV[:, :, :24], AT)
    with pytest.raises(ValueError, match="^attention: sliding_window"):
        ops.attention(Q, KV, KV, AT, sliding_window=0)


def test_contract_reaches_the_kernels():
    """`leaves` only where K is sharded; `kv_split` in attention; bits tell."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((m, 1536)), jnp.float32) for m in (4, 8))
    one, eight = (Ops(contract=Contract(leaves=n, kv_split=16)) for n in (1, 8))
    plain = one.matmul(x, w)
    assert (eight.matmul(x, w) == plain).all()
    assert (one.matmul(x, w, k_sharded=True) == plain).all()
    assert (eight.matmul(x, w, k_sharded=True) != plain).any()
    sizes = jnp.array([len(x)], jnp.int32)
    assert (eight.grouped_matmul(x, w[None], sizes) == plain).all()
    assert (eight.grouped_matmul(x, w[None], sizes, k_sharded=True) != plain).any()
    q, k, v = (jnp.asarray(rng.standard_normal(KV.shape), jnp.float32) for _ in range(3))
    q, at = q.transpose(0, 2, 1, 3), jnp.full((2, 32), 31, jnp.int32)
    coarse = Ops(contract=Contract(kv_split=32))
    assert (one.attention(q, k, v, at) != coarse.attention(q, k, v, at)).any()


@pytest.mark.parametrize(
    "option", [{"scale": 0.25}, {"sliding_window": 5}, {"soft_cap": 0.5}], ids=lambda o: [*o][0]
)
def test_options_reach_the_kernels(option):
    """Each of them alone changes the result; the default scale is D**-0.5."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(KV.shape), jnp.float32) for _ in range(3))
    q, at = q.transpose(0, 2, 1, 3), jnp.tile(jnp.arange(32, dtype=jnp.int32), (2, 1))
    ops = Ops(contract=Contract(kv_split=16))
    plain = ops.attention(q, k, v, at)
    assert (ops.attention(q, k, v, at, scale=8**-0.5) == plain).all()
    assert (ops.attention(q, k, v, at, **option) != plain).any()


def test_leading_axes_are_rows():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 64)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((8, 64)), jnp.float32)
    y = Ops().matmul(x, w)
    assert y.shape == (2, 3, 8)
    assert (y.reshape(6, 8) == Ops().matmul(x.reshape(6, 64), w)).all()
    y = Ops().gated_matmul(x, w)
    assert y.shape == (2, 3, 4)
    assert (y.reshape(6, 4) == Ops().gated_matmul(x.reshape(6, 64), w)).all()


def test_log_softmax_is_float32_for_any_logits():
    assert Ops().log_softmax(zeros(2, 8, dtype=BFLOAT16)).dtype == jnp.float32


@pytest.mark.parametrize("name", ["Portable", "triton", "mosaic", ""])
def test_unknown_implementation(name):
    allowed = "allowed: reference, portable, xla, mosaic_gpu, mosaic_tpu, jax_triton"
    with pytest.raises(ValueError, match=f"unknown implementation {name!r}; {allowed}"):
        Ops(name)


def test_implementation_that_does_not_cover_every_op():
    """It says which op, and what there is; nothing falls back in silence."""
    with pytest.raises(NotImplementedError, match="has no 'jax_triton' .* it has: reference, port"):
        Ops("jax_triton")


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_kernels_cover_every_op(name):
    assert Ops(name).implementation == name
    for op in pallas_kernels.OPS:
        assert name in pallas_kernels.available(op)


def test_kernels_for_tpu_run_on_a_cpu_only_when_interpreted():
    x, w = jnp.ones((3, 8)), jnp.ones((5, 8))
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU backend"):
        Ops("mosaic_tpu").matmul(x, w)
    with pltpu.force_tpu_interpret_mode():
        assert (Ops("mosaic_tpu").matmul(x, w) == 8).all()


@pytest.mark.parametrize("op", pallas_kernels.OPS)
def test_every_op_has_its_reference_its_default_and_its_control(op):
    assert pallas_kernels.available(op)[:3] == ("reference", "portable", "xla")
    for name in ("reference", "portable", "xla"):
        assert pallas_kernels.implementation_of(op, name).__name__ == op


def test_unknown_op():
    with pytest.raises(ValueError, match="unknown op 'conv'; ops: attention, embed"):
        pallas_kernels.implementation_of("conv", "portable")


def test_default_implementation_follows_the_device_and_the_dtype():
    def default(platform, capability=None, dtype=jnp.bfloat16):
        device = types.SimpleNamespace(platform=platform, compute_capability=capability)
        return default_implementation(device, dtype)

    assert default("cpu") == default("gpu", "8.0") == default("gpu", "10.0") == "portable"
    assert default("gpu", "9.0") == default("gpu", "9.0", jnp.float16) == "mosaic_gpu"
    assert default("gpu", "9.0", jnp.float32) == "portable"
    assert default_implementation() == default_implementation(jax.devices()[0])


@pytest.mark.parametrize(
    "kind", [kind for generation in GENERATIONS for kind in generation.device_kinds]
)
def test_default_implementation_on_a_tpu(kind):
    device = types.SimpleNamespace(platform="tpu", device_kind=kind)
    for dtype in (jnp.bfloat16, jnp.float32):
        assert default_implementation(device, dtype) == "mosaic_tpu"
    assert default_implementation(device, jnp.float16) == "portable"


def test_tpu_that_nobody_compiled_for():
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v4")
    message = "not been compiled for 'TPU v4', only for v5e, v5p, v6e, tpu7x; .*'portable'"
    with pytest.raises(NotImplementedError, match=message):
        default_implementation(device)


def test_ops_are_static_arguments():
    """Equal ops hash alike, so that a program is compiled once for them."""
    assert Ops("xla") == Ops("xla") and hash(Ops("xla")) == hash(Ops("xla"))
    assert Ops("xla") != Ops("portable") != Ops(contract=Contract(leaves=2))
    assert Ops("xla").fingerprint == Contract().fingerprint("xla")
