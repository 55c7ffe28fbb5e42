"""`batch_invariant`: the function transformation."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import tree_flatten

from jdet.contract import Contract
from jdet.ops import default_implementation
from jdet.transform.choices import WARN
from jdet.transform.interpreter import Run, retrace
from jdet.transform.rules import Rules

IMPLEMENTATIONS = ("portable", "mosaic_gpu")


def _check(implementation: str | None, contract: Contract | None, exclude: Any) -> Rules:
    if implementation is None:
        implementation = default_implementation()
    if implementation == "mosaic_tpu":
        implementation = "portable"
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


def _transform(fn: Callable[..., Any], rules: Rules, strict: bool, args: Any, kwargs: Any):
    run = Run(rules, strict=strict)
    out = retrace(lambda a, k: fn(*a, **k), (args, kwargs), run)
    if unused := sorted(rules.exclude - run.used):
        raise ValueError(
            f"batch_invariant: exclude={unused} matches nothing in {_name(fn)}; it holds "
            + ", ".join(sorted({entry.primitive for entry in run.entries}))
        )
    return out, run


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def batch_invariant(
    fn: Callable[..., Any],
    *,
    implementation: str | None = None,
    contract: Contract | None = None,
    exclude: tuple[str, ...] | list[str] = (),
    strict: bool = False,
) -> Callable[..., Any]:
    """`fn` with every sum and comparison in a tree that depends on the reduced extent alone."""
    if not callable(fn):
        raise TypeError(f"batch_invariant: {fn!r} is not a function")
    rules = _check(implementation, contract, exclude)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out, run = _transform(fn, rules, strict, args, kwargs)
        _warn(run)
        return out

    return wrapped
