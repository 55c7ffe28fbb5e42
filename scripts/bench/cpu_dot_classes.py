"""Which numbers of rows share their bits on this CPU, under plain XLA.

    python scripts/bench/cpu_dot_classes.py [--json FILE] [--only dots reductions ...]

`dots`: plain `lax.dot_general` with a float32 result. A class is a set of M whose results
agree, bit for bit, in the rows they have in common: "1 | 2-256" means that one row alone has
bits of its own and that the others do not see how many they are. Weights [N, K] have the
contracted dimension last, as checkpoints store them; [K, N] are their transpose.

`attention`: the same for the product of weights [M, S] and values [S, D], the values as
they lie in the cache or laid out anew as [D, S], and whether both have the same bits at M = 256.

`rows`: the M at which some row has other bits than the same row of 600 with weights [N, K]; N is a
multiple of 64, the contracted dimension last in the weights or first.

`reductions`: the same for a sum, a softmax and an RMSNorm over the last axis.

`elementwise`: how many elements of up to 2,000 arrays of length n have other bits than in
one array of 1,000,000 (`jnp` is XLA's own function, `jdet` that of pallas_kernels/trees.py).

The schedules of `portable` and of `jdet.batch_invariant` rest on these figures:
pallas_kernels/matmul/portable.py, pallas_kernels/attention/portable.py, jdet/transform/cpu_dots.py.
"""

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdet.environment import cpu_name
from jdet.pallas_kernels import trees

MS = (1, 2, 3, 4, 8, 16, 32, 33, 48, 64, 65, 128, 256)
# (N, K): SmolLM2-135M's projections, and a width of larger models.
SHAPES = {
    "qkv": (960, 576),
    "o": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "lm_head": (49152, 576),
    "4096x1024": (4096, 1024),
}
HEAD_DIMS = (8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 256)
SPLITS = (16, 256, 512, 1024)
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1000)
ELEMENTS = 1_000_000
ARRAYS = 2000


def bits(x: Any) -> np.ndarray:
    """The elements as integers."""
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.int32}[x.dtype.itemsize])


def classes(f: Callable[[np.ndarray], Any], x: np.ndarray) -> list[list[int]]:
    """MS, grouped by the bits of the rows in common; each class knows its tallest result."""
    found: list[tuple[list[int], np.ndarray]] = []
    for m in reversed(MS):
        y = bits(f(x[:m]))
        assert y.shape[0] == m
        members = next((ms for ms, tall in found if (y == tall[:m]).all()), None)
        if members is None:
            found.append(([m], y))
        else:
            members.append(m)
    return sorted(sorted(members) for members, _ in found)


def ranges(groups: Iterable[list[int]]) -> str:
    """[[1], [2, 3, ..., 256]] as '1 | 2-256': runs of MS."""
    parts = []
    for group in groups:
        runs: list[list[int]] = []
        for m in group:
            if runs and MS.index(m) == MS.index(runs[-1][-1]) + 1:
                runs[-1].append(m)
            else:
                runs.append([m])
        parts.append(", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs))
    return " | ".join(parts)


def dot_rows() -> Iterable[dict[str, Any]]:
    """The classes of every shape, layout and dtype."""
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        for name, (n, k) in SHAPES.items():
            x = rng.standard_normal((max(MS), k)).astype(jnp.dtype(dtype))
            w = rng.standard_normal((n, k)).astype(jnp.dtype(dtype))
            for layout, weights, contracted in (("[N, K]", w, 1), ("[K, N]", w.T.copy(), 0)):
                dims = (((1,), (contracted,)), ((), ()))

                @jax.jit
                def dot(x, weights, dims=dims):
                    return lax.dot_general(x, weights, dims, preferred_element_type=jnp.float32)

                placed = jax.device_put(weights)
                groups = classes(lambda x, f=dot, w=placed: f(x, w), x)
                yield {
                    "what": name,
                    "N": n,
                    "K": k,
                    "weights": layout,
                    "dtype": dtype,
                    "classes": ranges(groups),
                }


def row_rows() -> Iterable[dict[str, Any]]:
    """Every row of many M, for both layouts of the weights."""
    rng = np.random.default_rng(0)
    heights = [*range(4, 70), 96, *range(127, 133), *range(193, 197), *range(255, 261), 449, 500]
    for dtype in ("float32", "bfloat16"):
        for k in (8, 16, 48, 100, 576, 1000, 1024, 1536, 4096):
            x = rng.standard_normal((600, k)).astype(jnp.dtype(dtype))
            for n in (64, 192, 1024):
                w = rng.standard_normal((n, k)).astype(jnp.dtype(dtype))

                def dot(x, w, contracted):
                    dims = (((1,), (contracted,)), ((), ()))
                    return lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)

                whole = bits(jax.jit(lambda x, w, f=dot: f(x, w, 1))(x, w))
                for layout, weights, contracted in (("[N, K]", w, 1), ("[K, N]", w.T.copy(), 0)):
                    f = jax.jit(lambda x, w, f=dot, c=contracted: f(x, w, c))
                    other = [m for m in heights if (bits(f(x[:m], weights)) != whole[:m]).any()]
                    yield {
                        "N": n,
                        "K": k,
                        "weights": layout,
                        "dtype": dtype,
                        "M with other bits": other,
                        "of": len(heights),
                    }
                    jax.clear_caches()


def rms_norm(x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def attention_rows() -> Iterable[dict[str, Any]]:
    """The product of attention's weights and values, by the split's keys and the head dim."""
    rng = np.random.default_rng(0)

    def dot(contract: int) -> Callable[..., Any]:
        dims = (((3,), (contract,)), ((0, 1), (0, 1)))
        return jax.jit(lambda p, v: lax.dot_general(p, v, dims, preferred_element_type="float32"))

    for dtype, keys in itertools.product(("float32", "float16", "bfloat16"), SPLITS):
        p = rng.standard_normal((1, 1, max(MS), keys), np.float32).astype(dtype)
        for dim in HEAD_DIMS:
            v = rng.standard_normal((1, 1, keys, dim), np.float32).astype(dtype)
            forms = {"as they lie": (dot(2), v), "[D, S]": (dot(3), v.swapaxes(2, 3).copy())}
            found = {
                name: ranges(classes(lambda x, f=f, v=v: f(x[None, None], v)[0, 0], p[0, 0]))
                for name, (f, v) in forms.items()
            }
            first, second = (bits(f(p, v)) for f, v in forms.values())
            same = bool((first == second).all())
            row = {"keys": keys, "head_dim": dim, "dtype": dtype}
            yield {**row, "classes": found, "same bits": same}


def reduction_rows() -> Iterable[dict[str, Any]]:
    """The classes of reductions over one axis."""
    rng = np.random.default_rng(0)
    for width in (576, 1000, 49152):
        x = rng.standard_normal((max(MS), width)).astype(np.float32)
        for name, f in (
            ("sum", lambda x: x.sum(-1)),
            ("softmax", lambda x: jax.nn.softmax(x, axis=-1)),
            ("rms_norm", rms_norm),
        ):
            groups = classes(jax.jit(f), x)
            yield {"what": name, "width": width, "dtype": "float32", "classes": ranges(groups)}


def elementwise_rows() -> Iterable[dict[str, Any]]:
    """How exp and log depend on the length of their array."""
    rng = np.random.default_rng(0)
    cases = (
        ("exp", rng.uniform(-20, 5, ELEMENTS), {"jnp": jnp.exp, "jdet": trees.exp}),
        ("log", rng.uniform(1e-3, 50, ELEMENTS), {"jnp": jnp.log, "jdet": trees.log}),
    )
    for name, x, functions in cases:
        x = x.astype(np.float32)
        for owner, f in functions.items():
            f = jax.jit(f)
            whole = bits(f(x))
            differ = {}
            for n in LENGTHS:
                starts = range(0, min(ARRAYS * n, ELEMENTS - n + 1), n)
                count = sum((bits(f(x[s : s + n])) != whole[s : s + n]).sum() for s in starts)
                differ[n] = f"{count} of {len(starts) * n}"
            yield {"what": name, "function": owner, "elements that differ, by length": differ}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parts = {
        "dots": dot_rows,
        "rows": row_rows,
        "attention": attention_rows,
        "reductions": reduction_rows,
        "elementwise": elementwise_rows,
    }
    parser.add_argument("--only", nargs="*", choices=parts, default=list(parts))
    args = parser.parse_args()
    result: dict[str, Any] = {
        "device": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "command": "python scripts/bench/cpu_dot_classes.py --only " + " ".join(args.only),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "M": MS,
    }
    for part in args.only:
        result[part] = []
        for row in parts[part]():
            print(row, flush=True)
            result[part].append(row)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
