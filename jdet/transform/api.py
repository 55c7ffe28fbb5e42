"""`batch_invariant`: the function transformation."""

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jdet.contract import Contract
from jdet.ops import default_implementation
from jdet.transform.choices import KEEP, TWIN, WARN
from jdet.transform.constants import fenced
from jdet.transform.interpreter import Entry, Run, retrace
from jdet.transform.rules import Rules

IMPLEMENTATIONS = ("portable", "mosaic_gpu")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What became of each equation of a function, in the order of its trace; `str` is a table."""

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        counts = collections.Counter(
            (e.choice.action, e.primitive, e.choice.why, e.source) for e in self.entries
        )
        order = (TWIN, WARN, KEEP)
        rows = sorted(counts.items(), key=lambda row: order.index(row[0][0]))
        return "\n".join(
            f"{action:9}{count:4}  {primitive:22} {source}: {why}"
            for (action, primitive, why, source), count in rows
        )


def _check(
    fn: Any, implementation: str | None, contract: Contract | None, exclude: Sequence[str]
) -> Rules:
    if not callable(fn):
        raise TypeError(f"batch_invariant: {fn!r} is not a function")
    if implementation is None:
        usual = default_implementation()
        implementation = usual if usual in IMPLEMENTATIONS else "portable"
    if implementation == "xla":
        raise ValueError(
            "batch_invariant: implementation='xla' would replace nothing; call the function itself"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"batch_invariant: implementation={implementation!r}; allowed: "
            + ", ".join(IMPLEMENTATIONS)
        )
    if isinstance(exclude, str) or not all(isinstance(item, str) for item in exclude):
        raise ValueError(
            f"batch_invariant: exclude={exclude!r} must be a sequence of names of primitives "
            "or 'file.py:line' places"
        )
    contract = contract or Contract()
    if contract.kv_split != Contract().kv_split:
        raise ValueError(
            f"batch_invariant: contract.kv_split={contract.kv_split} has no effect here: "
            "attention is made of its parts; leave it at its default"
        )
    return Rules.of(implementation, contract, tuple(exclude))


def _warn(run: Run) -> None:
    seen = set()
    for entry in run.entries:
        if entry.choice.action == WARN and (entry.primitive, entry.source) not in seen:
            seen.add((entry.primitive, entry.source))
            warnings.warn(
                f"batch_invariant leaves {entry.primitive}({', '.join(entry.shapes)}) at "
                f"{entry.source} alone: {entry.choice.why}",
                stacklevel=3,
            )


def _transform(
    fn: Callable[..., Any], rules: Rules, strict: bool, args: Any, kwargs: Any
) -> tuple[Any, Run]:
    run = Run(rules, strict=strict)
    out = retrace(lambda a, k: fn(*a, **k), (args, kwargs), run, fenced)
    if unused := sorted(rules.exclude - run.used):
        raise ValueError(
            f"batch_invariant: exclude={unused} matches nothing in {_name(fn)}; it holds "
            + ", ".join(sorted({entry.primitive for entry in run.entries}))
        )
    return out, run


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


class BatchInvariant:
    """The type of `batch_invariant`: a function that has `explain` beside it."""

    def __call__(
        self,
        fn: Callable[..., Any],
        *,
        implementation: str | None = None,
        contract: Contract | None = None,
        exclude: Sequence[str] = (),
        strict: bool = False,
    ) -> Callable[..., Any]:
        """`fn` with every sum in a tree that depends on the extents it sums over alone.

        The result traces `fn` and binds it again, with a primitive of jdet's in the place of each
        that sums or rounds by the shape of an array: dots, convolutions, reductions, cumulative
        sums, windows, scatters, ragged dots, exponentials on a CPU. What an element of a result
        sums over decides its bits; how many other elements there are does not. So no axis has to
        be named as the batch. Derivatives, `jax.vmap` and what is inside of `jax.jit`, `scan`,
        `while_loop`, `cond`, `jax.checkpoint`, `jax.shard_map` and custom derivatives are covered
        too. Not what XLA's partitioner makes of arrays that are sharded automatically: the extents
        that each device gets are then chosen behind this transformation.

        Orders of accumulation: `jdet.transform.dots`, `reductions`, `cumulative`, `windows`,
        `scatters`, `ragged`, `convolutions`.

        Args:
          fn: a function of pytrees of arrays that can be traced; leaves that are no arrays are
            static.
          implementation: "portable", or "mosaic_gpu" (Hopper: dots of 16 and 32 bits by the
            project's kernel, where an infinite float32 operand gives NaN; the rest portable);
            None: that of this device.
          contract: its `leaves` cut the dots.
          exclude: names of primitives, or "file.py:line" places, that are left as they are.
          strict: refuse what is otherwise left with a warning: draws whose shape may hold the
            batch, collectives, routines of linear algebra, and code that a trace cannot see.

        Raises:
          ValueError, TypeError: an option outside what is allowed.
          NotImplementedError: when it is traced: a primitive that is unknown
            (`jdet.register_rule`) or has no fixed tree, named with its source line.
        """
        rules = _check(fn, implementation, contract, exclude)

        @functools.wraps(fn)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            out, run = _transform(fn, rules, strict, args, kwargs)
            _warn(run)
            return out

        return wrapped

    def explain(
        self,
        fn: Callable[..., Any],
        *,
        implementation: str | None = None,
        contract: Contract | None = None,
        exclude: Sequence[str] = (),
    ) -> Callable[..., Explanation]:
        """`explain(fn)(*args)`: what `batch_invariant` replaces in `fn`, and what it leaves.

        Nothing is computed: arguments may be `jax.ShapeDtypeStruct`. Options and errors as there.
        """
        rules = _check(fn, implementation, contract, exclude)

        @functools.wraps(fn)
        def explained(*args: Any, **kwargs: Any) -> Explanation:
            found: list[Run] = []

            def traced(*args: Any, **kwargs: Any) -> Any:
                out, run = _transform(fn, rules, False, args, kwargs)
                found.append(run)
                return out

            jax.eval_shape(traced, *args, **kwargs)
            return Explanation(tuple(found[0].entries))

        return explained


batch_invariant = BatchInvariant()
