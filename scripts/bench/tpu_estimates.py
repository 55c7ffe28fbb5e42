"""What the TPU compiler itself expects of jdet's kernels, beside plain XLA's. Needs no TPU.

    JAX_PLATFORMS=cpu .venv-tpu/bin/python scripts/bench/tpu_estimates.py \\
        --json scripts/bench/results/tpu-estimates.json

libtpu offers three numbers, of which one means something here:

- `cost_analysis()["optimal_seconds"]`: bytes and operations over the chip's peak. Of a Mosaic call
  it is what the kernel says of itself (`pl.CostEstimate`); of a call without one it is -1, so that
  the sum over a step is negative. It is written down, and compared with nothing.
- `estimated_cycles` in an instruction's `window_config`: XLA's own fusions alone have it.
- the static profile (`--xla_jf_dump_static_llo_profile_to`): cycles of an instruction of HLO from
  the bundles that were scheduled, Mosaic calls too. This is what is compared.

Limits of the profile. Copies run at the rate of the DMA engines, above that of HBM: fewer cycles
than the roofline's mean bound by HBM, and `bound` is the greater of the two. What XLA fetches ahead
(copy-start) is in nobody's cycles; the roofline has it. A loop that ends where the data say counts
as the profile guesses, so `attention` has no estimate, and no whole step has one. The profile walks
every turn of every loop, in minutes and gigabytes for long ones: so it is asked of single
products, and the head is cut. 0 cycles are no estimate: `gated_matmul` gets none. On v5e and v5p
libtpu 0.0.48.1 aborts while it writes a profile of a Mosaic call.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# Of a device: HBM bytes and bfloat16 operations a second, as jax 0.11.2 has them
# (jax/_src/tpu_info.py). The clock follows from the operations of a cycle: two matrix units of
# 256 x 256, two products a cycle each.
CHIPS = {"v6e": (1.64e12, 9.20e14), "tpu7x": (3.70e12, 1.155e15)}
_A_CYCLE = 2 * 256 * 256 * 2 * 2
ROWS = (1, 8, 64, 512)
# Qwen3-8B's weights [N, K]; the head, of 151936 rows, is cut.
PRODUCTS = {
    "qkv": ("matmul", 6144, 4096),
    "out": ("matmul", 4096, 4096),
    "down": ("matmul", 4096, 12288),
    "head, cut": ("matmul", 8192, 4096),
}


def estimate(place: Any, folder: Path, implementation: str, op: str, shape: Any) -> dict[str, Any]:
    """Compile one op for a TPU; the cycles of all that it became."""
    import jax
    import jax.numpy as jnp

    import jdet

    rows, n, k = shape
    for path in folder.iterdir():
        path.unlink()
    given = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, k), (n, k))]
    options = jdet.compiler_options(implementation, "tpu")
    jitted = jax.jit(getattr(jdet.Ops(implementation), op), compiler_options=options)
    start = time.perf_counter()
    compiled = jitted.lower(*place(given)).compile()
    cycles: dict[str, int] = {}
    for path in folder.iterdir():
        text = path.read_text()
        [name] = re.findall(r'op_name: "(.*)"', text)
        cycles[name] = int(re.findall(r"estimated_cycles: (\d+)", text)[0])
    known = cycles and all(cycles.values())
    return {
        "cycles": sum(cycles.values()) if known else None,
        "of": cycles,
        "optimal_seconds": (compiled.cost_analysis() or {}).get("optimal_seconds"),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The TPU compiler's own estimates.")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--chips", default="v6e,tpu7x", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--products", default=";".join(PRODUCTS), help="separated by semicolons")
    args = parser.parse_args()
    chips, products = args.chips.split(","), args.products.split(";")
    if set(chips) - set(CHIPS) or set(products) - set(PRODUCTS):
        parser.error(f"chips: {', '.join(CHIPS)}; products: {'; '.join(PRODUCTS)}")
    folder = Path(tempfile.mkdtemp())
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder}"

    import jdet
    from jdet.certify import without_tpu
    from jdet.pallas_kernels.generations import GENERATIONS

    places = {g.name: without_tpu(g.topology) for g in GENERATIONS if g.name in chips}
    report: dict[str, Any] = {
        "command": "scripts/bench/tpu_estimates.py " + " ".join(sys.argv[1:]),
        "what": "the compiler's static profile of single products; no TPU ran",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "fingerprint": jdet.Ops("mosaic_tpu").fingerprint,
        "model": "Qwen3-8B's products, bfloat16",
        "estimates": [],
    }
    for name in products:
        op, n, k = PRODUCTS[name]
        for chip, place in places.items():
            bandwidth, peak = CHIPS[chip]
            for rows in args.rows:
                size, work = 2 * (n * k + rows * (n + k)), 2 * rows * n * k
                roofline = round(max(size / bandwidth, work / peak) * peak / _A_CYCLE)
                row: dict[str, Any] = {"product": name, "chip": chip, "rows": rows}
                row["roofline_cycles"] = roofline
                for implementation in ("mosaic_tpu", "xla"):
                    row[implementation] = estimate(place, folder, implementation, op, (rows, n, k))
                ours, plain = row["mosaic_tpu"]["cycles"], row["xla"]["cycles"]
                if ours and plain:
                    row["ratio_of_cycles"] = round(ours / plain, 3)
                    row["ratio_of_bounds"] = round(max(ours, roofline) / max(plain, roofline), 3)
                report["estimates"].append(row)
                print(json.dumps(row), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
