"""The ops' bits on a GPU that works on another stream of the same process meanwhile.

    python scripts/check_gpu_streams.py [--implementation I] [--seconds 20] [--json FILE]

Needs PyTorch: a thread keeps a stream of its own full of products and copies. The same calls as
without it, on fixed inputs, over and over, must give the same bits; and the other stream must have
ended work between the first call and the last of each op. Exit status 1 otherwise.
"""

import argparse
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import jax
import jax.numpy as jnp
import numpy as np
from timing import environment  # pyright: ignore[reportMissingImports]

import jdet
from jdet.ops import default_implementation


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal bfloat16 numbers."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def calls(ops: jdet.Ops) -> dict[str, Callable[[], Any]]:
    """Each op at a size that takes a good part of the card, and one that takes little."""
    made: dict[str, Callable[[], Any]] = {}
    weights, gates = normal(1, 4096, 4096), normal(2, 8192, 4096)
    scale, experts = normal(3, 4096), normal(4, 16, 1024, 1024)
    for rows in (8, 1000):
        x = normal(rows, rows, 4096)
        few = normal(rows + 1, rows, 1024)
        sizes = jnp.full(16, rows // 16, jnp.int32).at[3].add(rows % 16)
        made[f"matmul {rows}"] = lambda x=x: ops.matmul(x, weights)
        made[f"gated_matmul {rows}"] = lambda x=x: ops.gated_matmul(x, gates)
        made[f"rms_norm {rows}"] = lambda x=x: ops.rms_norm(x, scale, eps=1e-6, residual=x)
        made[f"log_normalizer {rows}"] = lambda x=x: ops.log_normalizer(x.astype(jnp.float32))
        made[f"grouped_matmul {rows}"] = lambda x=few, s=sizes: ops.grouped_matmul(x, experts, s)
    for batch, length in ((4, 1), (1, 2000)):
        k, v = (normal(seed, batch, 8, 2048, 128) for seed in (5, 6))
        q = normal(7, batch, length, 32, 128)
        positions = jnp.arange(2000 - length, 2000)[None].repeat(batch, 0)
        made[f"attention {batch} x {length}"] = lambda q=q, k=k, v=v, p=positions: ops.attention(
            q, k, v, p
        )
    return made


def digest(value: Any) -> str:
    """Of the bytes of every array."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(value)]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


class OtherStream(threading.Thread):
    """Keeps a stream busy until it is told to stop; `done` counts what has ended."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.go_on = 0, True

    def run(self) -> None:
        import torch  # pyright: ignore[reportMissingImports]

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
            b, c = torch.empty_like(a), torch.empty_like(a)
            while self.go_on:
                for _ in range(8):
                    torch.matmul(a, a, out=b)
                    c.copy_(b)
                stream.synchronize()
                self.done += 1


def main() -> int:
    """Run the check; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--implementation")
    parser.add_argument("--seconds", type=float, default=20, help="beside the other stream")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ops = jdet.Ops(args.implementation or default_implementation())
    made = calls(ops)
    alone = {name: digest(call()) for name, call in made.items()}
    other = OtherStream()
    other.start()
    while not other.done:
        time.sleep(0.01)
    rows = []
    for name, call in made.items():
        before, end = other.done, time.monotonic() + args.seconds / len(made)
        row = {"call": name, "sha256": alone[name], "calls": 0, "wrong": 0}
        while time.monotonic() < end or other.done < before + 2:
            results = [call() for _ in range(20)]  # in flight together
            row["calls"] += len(results)
            row["wrong"] += sum(digest(result) != alone[name] for result in results)
        row["other_stream"] = other.done - before
        rows.append(row)
        print(row, flush=True)
    other.go_on = False
    other.join()
    result = {**environment(), "implementation": ops.implementation, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
