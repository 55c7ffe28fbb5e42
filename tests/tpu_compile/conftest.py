"""TPUs to compile for, without one; and Mosaic's kernels, read out of a compiled program."""

import base64
import collections
import dataclasses
import functools
import re

import jax
import pytest
from jax._src.lib import tpu  # pyright: ignore[reportPrivateImportUsage]
from jaxlib.mlir import ir, passmanager

import jdet
from jdet.certify import without_tpu
from jdet.certify.hlo import Instruction, Module
from jdet.pallas_kernels.generations import GENERATIONS

# What a sum or a routine is made of in Mosaic's dialects.
_FLOATS = """tpu.matmul tpu.dynamic_rotate vector.multi_reduction arith.addf arith.subf arith.mulf
    arith.divf arith.maximumf math.exp math.exp2 math.log math.rsqrt math.tanh""".split()


@pytest.fixture(scope="session", params=[g.name for g in GENERATIONS])
def chip(request):
    """Each generation that the kernels are for, by name."""
    return request.param


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Mosaic kernel of a compiled program.

    Attributes:
      name: that `pl.pallas_call` was given.
      vmem: bytes of VMEM that the compiler gave it.
      floats: its float operations in order: no sum is outside of them.
      products: the terms of each product of the matrix unit, in order.
      reduced: the terms of each `multi_reduction`, in order.
      grid: the steps of each dimension.
      invariant_numerics: `shape_invariant_numerics`.
    """

    name: str
    vmem: int
    floats: tuple[str, ...]
    products: tuple[int, ...]
    reduced: tuple[int, ...]
    grid: tuple[int, ...]
    invariant_numerics: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """What was compiled: the instructions that a row could follow the batch through; kernels."""

    findings: tuple[Instruction, ...]
    kernels: tuple[Kernel, ...]

    @property
    def count(self) -> collections.Counter[str]:
        """Kernels by name."""
        return collections.Counter(k.name for k in self.kernels)


@functools.cache
def _mosaic() -> ir.Context:
    context = ir.Context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    return context


def _text(body: str) -> str:
    with _mosaic(), ir.Location.unknown():
        module = ir.Module.parse(base64.b64decode(body))
        serde = "builtin.module(mosaic-serde{serialize=false})"
        passmanager.PassManager.parse(serde).run(module.operation)
        return str(module)


def _numbers(text: str, sep: str = ",") -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(sep) if n.strip().isdigit())


def _kernel(i: Instruction) -> Kernel:
    text = _text(i.attribute(r'"body":"([^"]*)"'))
    names = re.findall(r'(?:"([a-z]+\.[a-z_0-9]+)"\(|= (tpu\.[a-z_]+) )', text)
    product = r"tpu\.matmul .*?dot_dimension_numbers<\[(\d)\].*? : vector<([\dx]+)x"
    reduced = r"multi_reduction.*?reduction_dims = array<i64: ([\d, ]+)>.*? : \(vector<([\dx]+)x"
    used = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
    return Kernel(
        name=re.findall(r'sym_name = "(jdet_\w+)"', text)[0],
        vmem=int(i.attribute(used)),
        floats=tuple(name for pair in names for name in pair if name in _FLOATS),
        products=tuple(_numbers(shape, "x")[int(d)] for d, shape in re.findall(product, text)),
        reduced=tuple(
            _numbers(shape, "x")[d]
            for dims, shape in re.findall(reduced, text)
            for d in _numbers(dims)
        ),
        grid=_numbers(re.findall(r"iteration_bounds = array<i64: ([\d, ]+)>", text)[0]),
        invariant_numerics='"shape_invariant_numerics":false' not in i.line,
    )


@pytest.fixture(scope="session")
def compiled():
    """compiled(chip, implementation, function, shapes, donate): the `Program` for one TPU."""
    topologies = {g.name: g.topology for g in GENERATIONS}

    def compile_for(chip, implementation, function, shapes, donate=()):
        options = jdet.compiler_options(implementation, "tpu")
        place = without_tpu(topologies[chip])
        jitted = jax.jit(function, compiler_options=options, donate_argnums=donate)
        lowered = jitted.lower(*place(shapes))
        module = Module(lowered.compile().as_text() or "")
        calls = [i for i in module.instructions if "tpu_custom_call" in i.line]
        return Program(tuple(module.not_harmless()), tuple(map(_kernel, calls)))

    return compile_for
