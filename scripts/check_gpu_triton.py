"""The Triton matmul against the Mosaic GPU one, bit for bit, on one Hopper card.

    python scripts/check_gpu_triton.py [--json FILE]

Needs jax-triton. Fixed normal inputs; every M, 1 and 8 leaves, with and without bias, float32 and
bfloat16 results; then device times of both at two shapes. Exit status 1 on a mismatch.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdet.pallas_kernels import implementation_of

sys.path.insert(0, str(Path(__file__).parent / "bench"))

# N, K, leaves, bias, output
CASES = (
    (1000, 1032, 1, True, "float32"),
    (1000, 1088, 8, False, "float32"),
    (960, 576, 1, False, "bfloat16"),
    (4096, 4096, 1, False, "bfloat16"),
    (4096, 4096, 8, False, "bfloat16"),
)
BATCHES = (1, 8, 16, 17, 33, 64, 65, 129, 513, 1000)
TIMED = ((8, 4096, 4096), (64, 4096, 4096), (4096, 4096, 4096))


def operands(m: int, n: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng([n, k])
    w, b = rng.standard_normal((n, k), np.float32) * k**-0.5, rng.standard_normal(n, np.float32)
    x = rng.standard_normal((max(m, *BATCHES), k), np.float32)[:m]
    return tuple(jnp.asarray(v, jnp.bfloat16) for v in (x, w, b))  # pyright: ignore[reportReturnType]


def main() -> int:
    import timing  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    both = {name: implementation_of("matmul", name) for name in ("jax_triton", "mosaic_gpu")}
    result: dict[str, Any] = {**timing.environment(), "bits": [], "times": []}
    for n, k, leaves, with_bias, out in CASES:
        row: dict[str, Any] = {"n": n, "k": k, "leaves": leaves, "bias": with_bias, "out": out}
        row["elements_that_differ"] = {}
        for m in BATCHES:
            x, w, b = operands(m, n, k)
            bias = b if with_bias else None
            ours = [
                np.asarray(f(x, w, bias=bias, leaves=leaves, out_dtype=out).astype(jnp.float32))
                for f in both.values()
            ]
            row["elements_that_differ"][m] = int((ours[0] != ours[1]).sum())
        result["bits"].append(row)
        print(row, flush=True)
    for m, n, k in TIMED:
        x, w, _ = operands(m, n, k)
        copies = timing.copies_for(w.nbytes)
        xs, ws = [x + 0 for _ in range(copies)], [w + 0 for _ in range(copies)]
        row = {"m": m, "n": n, "k": k}
        for name, f in both.items():
            walk = jax.jit(lambda xs, ws, f=f: [f(x, w) for x, w in zip(xs, ws, strict=True)])
            row[f"{name}_us"] = round(timing.device_us(walk, xs, ws) / copies, 2)
        result["times"].append(row)
        print(row, flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(any(row["elements_that_differ"].values()) for row in result["bits"]))


if __name__ == "__main__":
    sys.exit(main())
