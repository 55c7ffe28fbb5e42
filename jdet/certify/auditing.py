"""What of a compiled function can make a row depend on the batch, read in its optimized HLO."""

import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jdet.certify.lowering import Lowered, kernels, lowered, roundings

_WHY = {
    "product": "a library or an emitter orders the sum over K, by the shapes",
    "split-K": "K is cut into parts, how many by the number of rows (split-K)",
    "sum": "the sum is cut and fused differently",
    "batch": "it runs over the batch: every row is in it",
    "scatter": "rows that meet in one place are added in the order they come",
    "sort": "equal keys fall in any order",
    "top-k": "another kernel at another size, and with it which of equal values is taken",
    "collective": "the way of the reduction follows the message's size",
    "custom call": "a kernel whose order of sums is not known here",
    "random numbers": "a state or a shape of the whole batch makes every row's numbers",
    "routine": "another routine, or another loop around it, computes it",
    "rounding": "a rounding that is there at some sizes and not at others",
}
_INSTEAD = {
    "product": "jdet.Ops().matmul",
    "split-K": (
        "jdet.Ops().matmul; compiler_options={'xla_gpu_experimental_force_split_k': 1} for the "
        "cut alone"
    ),
    "sum": "jdet.Ops().rms_norm, .log_softmax, or a tree of additions written out",
    "batch": "a reduction of each row alone",
    "scatter": "a gather of each row's terms, added in a fixed order",
    "sort": "jax.lax.sort(..., is_stable=True), or the index as a second key",
    "top-k": "jax.lax.sort(..., is_stable=True), or the index as a second key",
    "collective": "jax.lax.all_gather, then a sum in a fixed order",
    "custom call": "a kernel with a fixed tile, compared bit for bit at the sizes used",
    "random numbers": "a key for each row, made of its own seed and position (jax.vmap)",
    "routine": "a polynomial written out (jdet.pallas_kernels), or the operation alone",
    "rounding": "compiler_options={'xla_allow_excess_precision': False} (jdet.jit)",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One operation of the source that can make a row follow the batch.

    Attributes:
      kind: a key of the table of reasons: "product", "sum", "batch" (a reduction over it), ...
      op: what tracing called it, "dot_general".
      source: "file:line (function)".
      why, instead: in words.
      lowerings: at each size, what became of it; () where it is not there.
      changes: the sizes at which that is not what it is at the first.
    """

    kind: str
    op: str
    source: str
    why: str
    instead: str
    lowerings: dict[int, tuple[str, ...]]
    changes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found; `str()` is its table.

    Attributes:
      platform: compiled for.
      sizes: of the batches compiled.
      findings: empty if the function is certified.
      unchanged: sums and routines whose lowering is the same at all these sizes, as
        "op at source": nothing is known against them, and nothing but these sizes for them.
      ours: operations inside jdet's ops, by source; their trees are written down and tested.
      kernels: Mosaic kernels, by name.
      options: compiled with.
      failed: sizes that could not be compiled, and why.
    """

    platform: str
    sizes: tuple[int, ...]
    findings: tuple[Finding, ...]
    unchanged: tuple[str, ...]
    ours: dict[str, int]
    kernels: dict[str, int]
    options: dict[str, Any]
    failed: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def certified(self) -> bool:
        """All sizes were compiled, and outside of fixed trees no sum changes its structure."""
        return not self.findings and not self.failed

    @property
    def verdict(self) -> str:
        """CERTIFIED, or how much was found, with the sizes and the platform."""
        where = f"at batch sizes {', '.join(map(str, self.sizes))} on {self.platform}"
        if self.certified:
            return f"CERTIFIED {where}"
        told = f"{len(self.findings)} can make a row follow the batch, {where}"
        if self.failed:
            told += f"; not compiled at {', '.join(map(str, self.failed))}"
        return told

    def table(self) -> Table:
        """The findings, for `rich`."""
        table = Table(title=self.verdict, show_lines=True)
        for column in ("operation", "source", "lowered", "why", "instead"):
            table.add_column(column, overflow="fold")
        for f in self.findings:
            lines = [f"{n}: {'; '.join(how) or 'gone'}" for n, how in f.lowerings.items()]
            if not f.changes:
                lines = [f"all: {'; '.join(next(iter(f.lowerings.values())))}"]
            table.add_row(f.op or f.kind, f.source, "\n".join(lines), f.why, f.instead)
        return table

    def __str__(self) -> str:
        console = Console(width=140, color_system=None)
        with console.capture() as captured:
            console.print(self.table() if self.findings else self.verdict, markup=False)
            for size, why in self.failed.items():
                console.print(f"batch size {size} could not be compiled: {why}", markup=False)
            if self.unchanged:
                console.print(f"the same at all sizes: {', '.join(self.unchanged)}", markup=False)
            if self.ours or self.kernels:
                count = sum(self.ours.values()) + sum(self.kernels.values())
                console.print(f"in jdet's ops and Mosaic kernels: {count}", markup=False)
        return captured.get()

    def to_json(self) -> str:
        """All of it, with the verdict, as JSON."""
        return json.dumps({"verdict": self.verdict, **dataclasses.asdict(self)}, indent=1)


def audit(
    fn: Callable[..., Any],
    make_args: Callable[[int], Sequence[Any]],
    sizes: Sequence[int] = (1, 8, 64),
    *,
    compiler_options: dict[str, Any] | None = None,
    place: Callable[[Any], Any] | None = None,
) -> Audit:
    """Compiles fn(*make_args(size)) at several batch sizes and compares what became of it.

    Nothing runs. A product, a scatter that adds, an unstable sort, a collective or an unknown
    kernel is a finding as such; a sum, a top-k or a routine (an exponential, say) is one where
    it is lowered differently at another size; a sum or a maximum where it runs over the batch;
    a rounding to 16 bits where it is missing at some size. What stands in jdet's own ops is
    counted and not a finding.

    Args:
      fn: a function of arrays, or a jitted one (which keeps its own compiler options).
      make_args: a batch's arguments, arrays or their shapes.
      sizes: two or more.
      compiler_options: of every compile.
      place: for a device that is not here, `jdet.certify.without_device(...)`.

    Raises:
      ValueError: sizes are not two different ones from 1 up; or fewer than two of them can be
        compiled (a function that cannot be traced, say). Others that cannot, since the device
        has no room for them or they do not fit the function, stand in `failed`.
    """
    sizes = tuple(int(n) for n in sizes)
    if len(set(sizes)) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes={sizes}: give two different batch sizes or more, from 1 up")
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn, compiler_options=compiler_options)
    texts, failed, platform = {}, {}, ""
    for size in sizes:
        try:
            arguments = tuple(make_args(size))
            compiled = jitted.lower(*(place(arguments) if place else arguments)).compile()
        except Exception as error:
            # The others are worth reporting without it.
            failed[size] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        texts[size] = compiled.as_text()
        platform = _platform(compiled, platform)
    if len(texts) < 2:
        name = getattr(fn, "__name__", fn)
        told = "; ".join(f"at batch size {size}: {why}" for size, why in failed.items())
        raise ValueError(f"{name} cannot be compiled {told}; two sizes are needed to compare")
    compiled_sizes = tuple(texts)
    found = {size: lowered(text) for size, text in texts.items()}
    findings, unchanged = _judge(found)
    ours = collections.Counter(x.source for x in found[compiled_sizes[-1]] if x.ours)
    options = dict(compiler_options or {})
    # Without excess precision every rounding is made, wherever XLA puts it.
    if str(options.get("xla_allow_excess_precision")).lower() != "false":
        findings += _roundings(texts)
    return Audit(
        platform=platform,
        sizes=compiled_sizes,
        findings=tuple(findings),
        unchanged=tuple(unchanged),
        ours=dict(ours),
        kernels=dict(kernels(texts[compiled_sizes[-1]])),
        options=options,
        failed=failed,
    )


def _platform(compiled: Any, known: str) -> str:
    devices = [d for s in jax.tree.leaves(compiled.input_shardings) for d in s.device_set]
    return devices[0].platform if devices else known or jax.default_backend()


def _judge(found: dict[int, list[Lowered]]) -> tuple[list[Finding], list[str]]:
    """(findings, the operations that are the same at all sizes)."""
    groups: dict[tuple[str, str], dict[int, list[Lowered]]] = {}
    for size, instructions in found.items():
        for x in instructions:
            if not x.ours:
                group = groups.setdefault((x.op, x.source), {n: [] for n in found})
                group[size].append(x)
    findings, unchanged = [], []
    for (op, source), group in groups.items():
        lowerings = {n: tuple(sorted({x.how for x in xs})) for n, xs in group.items()}
        first = next(iter(lowerings.values()))
        changes = tuple(n for n, how in lowerings.items() if how != first)
        kinds = list(dict.fromkeys(x.kind for xs in group.values() for x in xs))
        kind = _gravest(op, kinds)
        if kind in ("sum", "choice") and _over_batch(group):
            kind = "batch"
        if kind == "choice":
            continue
        if kind == "product" and any(_split(xs) for xs in group.values()):
            kind = "split-K"
        if kind in ("sum", "routine", "top-k") and not changes:
            unchanged.append(f"{op} at {source}")
            continue
        findings.append(_finding(kind, op, source, lowerings, changes))
    return findings, unchanged


def _gravest(op: str, kinds: Sequence[str]) -> str:
    """What an operation is, where its parts are of several kinds."""
    # One row's product is often lowered as products and a sum, and is still a product.
    if op.startswith(("dot_general", "conv_general")):
        return "product"
    mild = ("choice", "routine", "sum")
    grave = [k for k in kinds if k not in mild]
    return grave[0] if grave else max(kinds, key=mild.index)


def _split(instructions: Sequence[Lowered]) -> bool:
    """Products of parts of K, and a sum of the parts."""
    kinds = {x.kind for x in instructions}
    return {"product", "sum"} <= kinds


def _over_batch(group: dict[int, list[Lowered]]) -> bool:
    """The number of terms grows with the batch; its stages, if there are some, multiply."""
    terms = {n: math.prod(x.extent or 1 for x in xs) for n, xs in group.items() if xs}
    sizes = list(terms)
    return len(sizes) > 1 and all(
        any(terms[n] * m**k == terms[m] * n**k for k in (1, 2, 3))
        for n, m in itertools.pairwise(sizes)
    )


def _roundings(texts: dict[int, str]) -> Iterator[Finding]:
    there = {n: roundings(text) for n, text in texts.items()}
    for source, dtype in sorted(set().union(*there.values())):
        lowerings = {
            n: (f"rounded to {dtype}",) if (source, dtype) in found else ()
            for n, found in there.items()
        }
        first = next(iter(lowerings.values()))
        changes = tuple(n for n, how in lowerings.items() if how != first)
        if changes:
            yield _finding("rounding", "convert", source, lowerings, changes)


def _finding(
    kind: str, op: str, source: str, lowerings: dict[int, tuple[str, ...]], changes: tuple[int, ...]
) -> Finding:
    return Finding(kind, op, source, _WHY[kind], _INSTEAD[kind], lowerings, changes)
