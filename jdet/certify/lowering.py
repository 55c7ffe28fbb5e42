"""How each operation that could follow the batch was lowered, in words that the batch is not in."""

import collections
import dataclasses
import functools
import math
import pathlib
import re

from jdet.certify.hlo import Instruction, Module
from jdet.pallas_kernels import __file__ as kernels_file

_KERNELS = str(pathlib.Path(kernels_file).parent)
_PLAIN = "xla.py"
_PRODUCTS = ("dot", "convolution")
_PRODUCT_CALLS = r"cublas|cudnn|gemm|matmul|conv|onednn|\$dot"
_COLLECTIVES = """all-reduce reduce-scatter all-reduce-start collective-broadcast
    all-to-all collective-permute""".split()
_RANDOM = "rng rng-bit-generator rng-get-and-update-state".split()
_SUMS = "reduce reduce-window select-and-scatter".split()


@dataclasses.dataclass(frozen=True)
class Lowered:
    """One instruction that the batch could show in, at one batch size.

    Attributes:
      kind: "product", "sum", "choice" (a maximum, say), "scatter", "sort", "top-k",
        "collective", "custom call", "random numbers" or "routine".
      op: what tracing called it, "dot_general".
      source: "file:line (function)" of the user's code.
      how: its lowering, without the batch's size.
      extent: of a sum or choice, the number of its terms; else 0.
      ours: it is in an op of jdet's, whose tree is written down and tested.
    """

    kind: str
    op: str
    source: str
    how: str
    extent: int
    ours: bool


def lowered(hlo: str) -> list[Lowered]:
    """Those of a program that are not harmless, in its order."""
    module = Module(hlo)
    found = []
    for i in module.instructions:
        # Harmless by itself, but not where it takes in all rows, or leaves ties open.
        choice = i.opcode in ("reduce", "reduce-window") and not re.match(r"\(?pred", i.result)
        sort = i.opcode == "sort" and _ties(module, i)
        if i.opcode == "fusion" or (module.harmless(i) and not (choice or sort)):
            continue
        # A combiner is described by what calls it.
        if i.computation in _combiners(module):
            continue
        named = _named(module, i)
        kind = "choice" if choice and module.harmless(i) else _kind(i)
        extent = _extent(module, i) if kind in ("sum", "choice") else 0
        found.append(
            Lowered(
                kind=kind,
                op=named.op.rsplit("/", 1)[-1],
                source=named.frames[0] if named.frames else "",
                how=_how(module, i, kind, extent),
                extent=extent,
                ours=_ours(named.frames),
            )
        )
    return found


def kernels(hlo: str) -> collections.Counter[str]:
    """How many Mosaic kernels it calls, by name."""
    module = Module(hlo)
    calls = [i for i in module.instructions if i.opcode == "custom-call" and module.harmless(i)]
    return collections.Counter(i.op.rsplit("/", 1)[-1] or i.name for i in calls)


def roundings(hlo: str) -> set[tuple[str, str]]:
    """(source, dtype) of the 16-bit results that are computed from wider ones."""
    module = Module(hlo)
    found = set()
    for i in module.instructions:
        if i.opcode not in ("convert", *_PRODUCTS) or i.dtype not in ("bf16", "f16"):
            continue
        before = module.operand(i, 0)
        if i.opcode == "convert" and (before is None or before.dtype not in ("f32", "f64")):
            continue
        # A rounding that XLA moved carries no source; what it rounds does.
        at: Instruction | None = i
        while at is not None and not at.frames:
            at = module.operand(at, 0)
        if at is not None:
            found.add((at.frames[0], i.dtype))
    return found


@functools.lru_cache(maxsize=4)
def _combiners(module: Module) -> frozenset[str]:
    names = (
        i.calls
        for i in module.instructions
        if i.opcode in (*_SUMS, "scatter", "sort", *_COLLECTIVES, "map")
    )
    return frozenset(name for calls in names for name in calls)


def _named(module: Module, i: Instruction) -> Instruction:
    """It, or what names it: parts that XLA makes of an operation carry no source."""
    if i.frames and i.op:
        return i
    combiner = [b for name in i.calls for b in module.bodies[name] if b.root and b.frames]
    if combiner:
        return combiner[0]
    waiting, seen = [i], set()
    while waiting and len(seen) < 64:
        at = waiting.pop(0)
        if at.frames and at.op and at is not i and at.opcode != "fusion":
            return at
        seen.add((at.computation, at.name))
        waiting += [u for u in _users(module, at) if (u.computation, u.name) not in seen]
    return i


def _users(module: Module, i: Instruction) -> list[Instruction]:
    """What reads its result: in a fusion that it is given to, or around the fusion it ends."""
    found = []
    for u in module.bodies[i.computation]:
        if i.name not in u.operands:
            continue
        if u.opcode != "fusion":
            found.append(u)
            continue
        number = u.operands.index(i.name)
        body = [b for name in u.calls for b in module.bodies[name]]
        found += [b for b in body if b.opcode == "parameter" and f"parameter({number})" in b.line]
    caller = module.callers.get(i.computation)
    if i.root and caller is not None and caller.opcode == "fusion":
        found += _users(module, caller)
    return found


def _kind(i: Instruction) -> str:
    target = i.attribute(r'custom_call_target="([^"]*)"')
    if i.opcode in _PRODUCTS or re.search(_PRODUCT_CALLS, target, re.I):
        return "product"
    if target == "TopK" or i.opcode == "topk":
        return "top-k"
    if i.opcode in _SUMS:
        return "sum"
    if i.opcode in _COLLECTIVES:
        return "collective"
    if i.opcode in _RANDOM:
        return "random numbers"
    return {"scatter": "scatter", "sort": "sort", "custom-call": "custom call"}.get(
        i.opcode, "routine"
    )


def _ours(frames: tuple[str, ...]) -> bool:
    files = [frame.rpartition(":")[0] for frame in frames]
    return any(f.startswith(_KERNELS) and not f.endswith(_PLAIN) for f in files)


def _ties(module: Module, i: Instruction) -> bool:
    """An unstable sort of several arrays that compares the first alone: ties fall anyhow."""
    if "is_stable=true" in i.line or len(i.operands) < 2:
        return False
    body = [b for name in i.calls for b in module.bodies[name]]
    numbers = {
        b.name: int(b.attribute(r"parameter\((\d+)\)")) for b in body if b.opcode == "parameter"
    }
    read = {numbers[o] for b in body for o in b.operands if o in numbers}
    return max(read, default=0) < 2


def _extent(module: Module, i: Instruction) -> int:
    if i.opcode != "reduce":
        return math.prod(int(n) for n in i.attribute(r"size=([\dx]+)").split("x") if n)
    source = module.operand(i, 0)
    dimensions = [int(d) for d in i.attribute(r"dimensions=\{([\d,]*)\}").split(",") if d]
    return math.prod(source.shape[d] for d in dimensions) if source else 0


def _how(module: Module, i: Instruction, kind: str, extent: int) -> str:
    parts = [i.opcode]
    target = i.attribute(r'custom_call_target="([^"]*)"')
    if target:
        parts = [target]
        algorithm = i.attribute(r'"selected_algorithm":"?(\d+)')
        parts += [f"algorithm {algorithm}"] if algorithm else []
    if i.opcode in _PRODUCTS:
        parts.append(f"in {i.dtype}")
        left = module.operand(i, 0)
        inner = [int(d) for d in i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",") if d]
        if left is not None and left.shape:
            parts.append(f"over {math.prod(left.shape[d] for d in inner)}")
    if extent:
        parts.append(f"of {extent}")
    if i.opcode == "sort":
        parts.append("stable" if "is_stable=true" in i.line else "unstable")
    fusion = module.fusion(i)
    where = fusion or i
    emitter = where.attribute(r'"kind":"(\w+)"').strip("_")
    if emitter:
        parts.append(f"by {emitter}")
    elif fusion is not None:
        parts.append(f"in a loop of XLA's ({fusion.attribute(r'kind=(k[A-Z]\w+)')})")
    else:
        parts.append("outside of fusions")
    tiles = re.findall(r'"sizes":\[([^\]]*)\]', where.line)
    if tiles and kind != "routine":
        parts.append("tiles " + " ".join(t.replace('"', "").replace(",", "x") for t in tiles))
    if kind == "sum" and fusion is not None:
        beside = {
            b.opcode
            for name in fusion.calls
            for b in module.bodies[name]
            if b.opcode not in _QUIET and b is not i
        }
        if beside:
            parts.append(f"with {', '.join(sorted(beside))}")
    return " ".join(parts)


_QUIET = """bitcast bitcast-convert broadcast constant copy get-tuple-element iota parameter
    reshape transpose tuple slice pad concatenate""".split()
