"""The kernels as ptxas has them: what is spilled, and that nothing is joined that was not named.

A product and a sum that a compiler joins in one schedule and not in another would make two trees
of one.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jdet.pallas_kernels.attention import mosaic_gpu
from jdet.pallas_kernels.expert_norm.mosaic_gpu import expert_norm
from jdet.pallas_kernels.grouped_gated_matmul.mosaic_gpu import grouped_gated_matmul
from jdet.pallas_kernels.grouped_matmul.mosaic_gpu import grouped_matmul
from jdet.pallas_kernels.log_normalizer.mosaic_gpu import log_normalizer
from jdet.pallas_kernels.rms_norm.mosaic_gpu import rms_norm, schedules
from jdet.pallas_kernels.route import mosaic_gpu as routing


@pytest.fixture
def kernels(on_h100, tmp_path, monkeypatch):
    """kernels(f, *arguments): by name, the count of each instruction and the bytes spilled."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def compile_for_h100(f, *arguments):
        for old in tmp_path.iterdir():
            old.unlink()
        jax.jit(f).lower(*on_h100(arguments)).compile()
        found = {}
        for report in tmp_path.glob("*.ptxas"):
            ptx = report.with_suffix(".ptx").read_text()
            opcodes = re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.:]*)", ptx, re.M)
            spilled = re.findall(r"(\d+) bytes spill", report.read_text())
            name = re.sub(r"_\d+$", "", report.stem)
            found[name] = collections.Counter(opcodes), sum(map(int, spilled))
        return found

    return compile_for_h100


# The last three with Gemma's float32 weights.
@pytest.mark.parametrize(
    ("dim", "wide"),
    [(d, False) for d in (64, 128, 576, 4096, 12288)] + [(d, True) for d in (640, 1152, 5376)],
)
@pytest.mark.parametrize("residual", [True, False])
def test_rms_norm(kernels, dim, wide, residual):
    for schedule in schedules(1000, dim):
        x = jax.ShapeDtypeStruct((1000, dim), jnp.bfloat16)
        weight = jax.ShapeDtypeStruct((dim,), jnp.float32 if wide else jnp.bfloat16)

        def norm(x, r, weight, schedule=schedule):
            other = r if residual else None
            return rms_norm(x, weight, eps=1e-5, residual=other, schedule=schedule)

        [(opcodes, spilled)] = kernels(norm, x, x, weight).values()
        assert spilled == 0
        # That of the mean and eps. Squares are rounded before they are added.
        assert opcodes["fma.rn.f32"] == schedule.tiles, schedule
        assert opcodes["mul.rn.f32"] > 0


def test_expert_norm(kernels):
    """Qwen3-30B-A3B's: products of experts are rounded before they are added."""
    bfloat16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights, places = (jax.ShapeDtypeStruct((9, 8), t) for t in (jnp.float32, jnp.int32))
    norm = functools.partial(expert_norm, eps=1e-6)
    given = bfloat16((72, 2048)), weights, places, bfloat16((2048,)), bfloat16((9, 2048))
    [(opcodes, spilled)] = kernels(norm, *given).values()
    # Of a thread's 16 elements: the products, the squares, and those of the norm.
    assert spilled == 0 and opcodes["fma.rn.f32"] == 1
    assert opcodes["mul.rn.f32"] >= 16 * 8 + 16


@pytest.mark.parametrize("vocabulary", [49152, 50257, 151936])
def test_log_normalizer(kernels, vocabulary):
    found = kernels(log_normalizer, jax.ShapeDtypeStruct((3, vocabulary), jnp.float32))
    opcodes, spilled = found["jdet_log_normalizer"]
    assert spilled == 0 and opcodes["fma.rn.f32"] == 0
    assert opcodes["ex2.approx.ftz.f32"] == 32
    opcodes, spilled = found["jdet_log_normalizer_merge"]
    # Those of libdevice's logarithm.
    assert spilled == 0 and opcodes["mul.rn.f32"] > 0


WINDOW = {"sliding_window": 300}
BOTH = {"sliding_window": 300, "soft_cap": 50.0}
# Heads, heads of keys, head size; queries; schedule; options; bytes that may be spilled, stores and
# loads, which ptxas reports twice.
ATTENTION = {
    "decode": ((32, 8, 128), 1, mosaic_gpu.Schedule("spread"), {}, 0),
    "decode, window": ((32, 8, 128), 1, mosaic_gpu.Schedule("spread"), WINDOW, 0),
    "decode, both": ((32, 8, 128), 1, mosaic_gpu.Schedule("spread"), BOTH, 0),
    "prefill": ((32, 8, 128), 300, mosaic_gpu.Schedule("walked", wgs=2), {}, 1600),
    "prefill, both": ((9, 3, 64), 300, mosaic_gpu.Schedule("walked", wgs=2), BOTH, 0),
    "decode of 256": ((8, 4, 256), 1, mosaic_gpu.Schedule("spread"), {}, 240),
    "prefill of 256, both": ((8, 4, 256), 300, mosaic_gpu.Schedule("walked"), BOTH, 3600),
}


@pytest.mark.parametrize(
    ("heads", "length", "schedule", "options", "room"), ATTENTION.values(), ids=ATTENTION
)
def test_attention(kernels, heads, length, schedule, options, room):
    h, n, dim = heads
    q = jax.ShapeDtypeStruct((8, length, h, dim), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((8, n, 1024, dim), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((8, length), jnp.int32)

    def attend(q, k, v, positions):
        return mosaic_gpu.attention(
            q, k, v, positions, scale=1.0, kv_split=256, schedule=schedule, **options
        )

    found = kernels(attend, q, cache, cache, positions)
    opcodes, spilled = found["jdet_attention"]
    # Of each split that is compiled, masked and not if walked: a score, a value of o, one of l,
    # for each of a thread's rows that may carry a query: one in decode, two in prefill.
    rows = 1 if length == 1 else 2
    scores, values = rows * 64, rows * min(dim, 128) // 4
    splits = 1 if schedule.kind == "spread" else 2
    # Without a window those of which only the first tile is seen are compiled too.
    halves = 1 if schedule.kind == "walked" and "sliding_window" not in options else 0
    fmas = splits * scores + halves * scores // 2 + (splits + halves) * (values + rows)
    assert opcodes["fma.rn.f32"] == fmas
    assert opcodes["rcp.approx.ftz.f32"] == (splits * scores if "soft_cap" in options else 0)
    assert spilled <= room
    if schedule.kind == "spread":
        # Values of o, of which a thread has neighbours, and one of l, of each split of a fetch.
        opcodes, spilled = found["jdet_attention_fold"]
        values = min(schedule.merge_columns, dim) // 32
        assert opcodes["fma.rn.f32"] == schedule.fetch * (values + 1)
        assert spilled == 0


@pytest.mark.parametrize("rows", [8, 512, 65536])
def test_grouped_matmuls(kernels, rows):
    """Qwen3-30B-A3B's experts in decode and prefill: as in matmul, no register is spilled."""
    bfloat16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((128,), jnp.int32)
    found = kernels(grouped_matmul, bfloat16((rows, 768)), bfloat16((128, 2048, 768)), sizes)
    assert found["jdet_grouped_matmul"][1] == 0
    x, w = bfloat16((rows, 2048)), bfloat16((128, 1536, 2048))
    opcodes, spilled = kernels(grouped_gated_matmul, x, w, sizes)["jdet_grouped_gated_matmul"]
    assert spilled == 0 and opcodes["ex2.approx.ftz.f32"] > 0


@pytest.mark.parametrize(
    ("m", "experts", "k"), [(1, 128, 8), (16, 128, 8), (256, 128, 8), (3, 512, 32)]
)
def test_route(kernels, m, experts, k):
    """Products and quotients are the named ones; nothing is joined, nothing spilled."""
    logits = jax.ShapeDtypeStruct((m, experts), jnp.float32)
    routed = jax.ShapeDtypeStruct((m,), jnp.bool_)
    for schedule in routing.SCHEDULES:
        if m > 16 and not schedule.apart:
            continue
        found = kernels(
            functools.partial(routing.route, k=k, normalise=True, schedule=schedule), logits, routed
        )
        assert len(found) == 1 + schedule.apart
        assert not any(spilled for _, spilled in found.values())
        opcodes = found["jdet_route"][0]
        joined = [
            name for name in opcodes if name.startswith(("fma", "mad.rn", "mul.f32", "div.rn"))
        ]
        assert joined == [] and opcodes["redux.sync.max.s32"] > 0
        assert opcodes["div.full.f32"] % (experts // 32 + 1) == 0
