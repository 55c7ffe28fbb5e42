"""What XLA makes of `jdet.batch_invariant` for an H100: its program, and its own PTX."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

import jdet
from jdet.certify.hlo import parse
from jdet.pallas_kernels.matmul.mosaic_gpu import matmul
from jdet.transform.dots import MERGED_ROWS


def attention(q, k, v, w):
    scores = jnp.einsum("BTHGD,BSHD->BHGTS", q, k) * 0.3
    weights = jax.nn.softmax(jnp.where(scores > -1, scores, -1e30), -1)
    x = jnp.einsum("BHGTS,BSHD->BTHGD", weights, v)
    x = (x * x - jnp.mean(x * x, -1, keepdims=True)) * 0.5 + x
    return jnp.einsum("BTHGD,HGDE->BTE", x, w)


def program_and_ptx(f, example, folder):
    """The optimized HLO, and XLA's own PTX, with the options that a plain `jax.jit` has."""
    step = jax.jit(
        jdet.batch_invariant(f, implementation="mosaic_gpu"),
        compiler_options={"xla_dump_to": str(folder), "xla_dump_emitter_re": "ptx"},
    )
    hlo = step.lower(*example).compile().as_text() or ""
    return hlo, "".join(path.read_text() for path in folder.glob("*.ptx"))


FLOATS = r"(?:f32|f16|bf16)(?:x2)?"


def arithmetic(ptx):
    """Its additions, products, maxima and FMAs."""
    return re.findall(rf"\b(?:add|sub|mul|max|min|fma)\.(?:[\w.]*\.)?{FLOATS}\b", ptx)


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def compiled(request, on_h100, tmp_path):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, request.param)  # noqa: E731
    key = of(3, 136, 2, 64)
    return program_and_ptx(
        attention, on_h100((of(3, 9, 2, 4, 64), key, key, of(2, 4, 64, 96))), tmp_path
    )


def test_every_product_is_a_kernels(compiled):
    hlo, _ = compiled
    opcodes = collections.Counter(i.opcode for i in parse(hlo))
    assert opcodes["custom-call"] == 3, opcodes
    assert not {"dot", "convolution", "while"} & set(opcodes)
    assert "triton" not in hlo


@pytest.mark.parametrize(("rows", "launches"), [(9, 1), (MERGED_ROWS + 1, 3)])
def test_projections_are_one_launch_for_few_rows(on_h100, tmp_path, rows, launches):
    def projections(x, q, k, v):
        return jnp.einsum("td,dhe->the", x, q), x @ k, x @ v

    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    example = on_h100((of(rows, 136), of(136, 3, 64), of(136, 72), of(136, 40)))
    hlo, _ = program_and_ptx(projections, example, tmp_path)
    assert collections.Counter(i.opcode for i in parse(hlo))["custom-call"] == launches


@pytest.mark.parametrize(("begin", "in_place"), [(100, False), (128, True)])
def test_a_kernel_reads_no_slice_from_between_addresses(on_h100, tmp_path, begin, in_place):
    """A row is 2,064 bytes: 100 of them are no multiple of 256. XLA by itself passes both."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    example = on_h100((of(9, 1032), of(1000, 1032)))
    hlo, _ = program_and_ptx(lambda x, w: x @ w[begin : begin + 96].T, example, tmp_path)
    assert ("dynamic-slice-fusion" in hlo) == in_place
    control = jax.jit(lambda x, w: matmul(x, w[begin : begin + 96]))
    assert "dynamic-slice-fusion" in (control.lower(*example).compile().as_text() or "")


def test_a_cache_of_any_length_is_read_as_it_lies(on_h100, tmp_path):
    def values(weights, v):
        return jnp.einsum("bgs,bsd->bgd", weights, v)

    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    hlo, _ = program_and_ptx(values, on_h100((of(3, 4, 1039), of(3, 1039, 64))), tmp_path)
    # Of the left operand, whose rows must be multiples of 16 bytes.
    assert {i.shape for i in parse(hlo) if i.opcode == "pad"} == {(3, 4, 1040)}


def test_instructions_round_one_by_one(compiled):
    """No product is joined with a sum (`alone` relies on it); maxima are max.NaN (reductions)."""
    _, ptx = compiled
    found = [opcode for opcode in arithmetic(ptx) if not opcode.startswith("fma")]
    assert {"add.rn.f32", "mul.rn.f32"} < set(found)
    assert any(opcode.startswith("max.NaN") for opcode in found)
    allowed = re.compile(rf"(?:add|sub|mul)\.rn\.{FLOATS}|max\.NaN\.{FLOATS}")
    assert all(allowed.fullmatch(opcode) for opcode in found), found
    # An exponential has fmas of its own: three, and one that rounds down.
    joined = len(re.findall(r"\bfma\.rn\.\w+", ptx))
    assert joined == 3 * len(re.findall(r"\bex2\.approx", ptx))


# Of arrays of one 16-bit dtype: the instructions, t for the dtype.
CHAINS = {
    "product and sum": (lambda a, b, c: a * b + c, "mul.rn.t add.rn.t"),
    "sums": (lambda a, b, c: a + b - c, "add.rn.t sub.rn.t"),
    "extremes": (
        lambda a, b, c: jnp.minimum(jnp.maximum(a * b, c), a),
        "mul.rn.t max.NaN.t min.NaN.t",
    ),
    "choice": (lambda a, b, c: jnp.where(a > b, a * b, c) + c, "mul.rn.t add.rn.t"),
    "widened": (
        lambda a, b, c: (a * b).astype("float32") + c.astype("float32"),
        "mul.rn.t add.rn.f32",
    ),
    "narrowed": (
        lambda a, b, c: (a.astype("float32") * 3.0 + b.astype("float32")).astype(a.dtype) + c,
        "mul.rn.f32 add.rn.f32 add.rn.t",
    ),
    "two factors": (lambda a, b, c: a * 3 * b * 3 + c, "mul.rn.t mul.rn.t mul.rn.t add.rn.t"),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("chain", CHAINS)
def test_16_bits_are_rounded_by_the_card(chain, dtype, on_h100, tmp_path):
    """XLA neither widens nor joins these instructions: `lowerings` leaves them as they are."""
    f, instructions = CHAINS[chain]
    of = jax.ShapeDtypeStruct((1024, 64), dtype)
    _, ptx = program_and_ptx(f, on_h100((of, of, of)), tmp_path)
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    wanted = re.sub(r"\bt\b", short, instructions).split()
    assert sorted(arithmetic(ptx)) == sorted(wanted), ptx


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_constants_are_not_joined(rows, dtype, on_h100, tmp_path):
    """Of one row neither: nothing has to be broadcast to its shape (transform/constants.py)."""
    a, b = (jnp.linspace(0, n, 64, dtype=dtype) for n in (1, 2))
    of = jax.ShapeDtypeStruct((rows, 64), dtype)
    _, ptx = program_and_ptx(lambda x: (x * a * b) + a + b, on_h100((of,)), tmp_path)
    kinds = collections.Counter(opcode[:3] for opcode in arithmetic(ptx))
    assert kinds == {"mul": 2, "add": 2}


def test_partial_sums_are_written_by_a_thread_each(on_h100, tmp_path):
    """No thread of a long softmax is thousands of instructions long."""
    of = jax.ShapeDtypeStruct((2048, 1021), jnp.bfloat16)
    hlo, ptx = program_and_ptx(lambda x: jax.nn.softmax(x, -1), on_h100((of,)), tmp_path)
    sums = max(body.count("add.rn.f32") for body in ptx.split(".entry")[1:])
    # Fifteen, and one in each of sixteen exponentials.
    assert sums == 31, sums
    assert "f32[131073]" in hlo
