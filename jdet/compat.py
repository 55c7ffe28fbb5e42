"""What differs between the jax versions this library runs on, in one place."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.api_util import debug_info
from jax.extend import core, linear_util, source_info_util
from jax.interpreters import partial_eval


def partitionable_threefry() -> contextlib.AbstractContextManager[None]:
    """Random bits that depend on (key, index) alone, not on the length of the draw."""
    return jax.threefry_partitionable(True)


def equation_context(equation: Any) -> contextlib.AbstractContextManager[None]:
    """What was current when the equation was traced: source line, names, mesh, options."""
    stack = source_info_util.current_name_stack() + equation.source_info.name_stack

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with (
            source_info_util.user_context(equation.source_info.traceback, name_stack=stack),
            equation.ctx.manager,
        ):
            yield

    return enter()


def source_of(equation: Any) -> str:
    """ "file.py:12:4 (function)" of the line that asked for the equation."""
    return source_info_util.summarize(equation.source_info)


def wrap_function(function: Callable[..., Any], like: Any) -> Any:
    """`function` as the subfunction of a primitive, with the debug information of another."""
    return linear_util.wrap_init(function, debug_info=like.debug_info)


def trace_jaxpr(function: Callable[..., Any], avals: Sequence[Any], like: Any = None) -> Any:
    """The closed jaxpr of a function from lists of arrays to lists of arrays."""
    if like is None:
        debug = debug_info("batch_invariant", function, tuple(avals), {})
    else:
        debug = like.debug_info
    wrapped = linear_util.wrap_init(function, debug_info=debug)
    jaxpr, _, consts = partial_eval.trace_to_jaxpr_dynamic(wrapped, list(avals))
    return core.ClosedJaxpr(jaxpr, consts)


def store(ref: Any, value: Any) -> None:
    """`ref[...] = value` in a Mosaic GPU kernel, in parts of a sector too.

    From jax 0.12 on these have to be asked for, by a function that 0.11 does not have.
    """
    from jax.experimental.pallas import mosaic_gpu  # where no kernel is used, not imported

    if (by_name := getattr(mosaic_gpu, "store", None)) is not None:
        by_name(ref, value, optimized=False)
    else:
        ref[...] = value


def shard_map_of(equation: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under `jax.shard_map` with the mesh and the specs of an equation that is one."""
    params = equation.params
    return jax.shard_map(
        function,
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=params["out_specs"],
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )
