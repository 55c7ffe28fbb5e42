"""What the TPU compiler itself expects of a step: jdet's kernels beside plain XLA. Needs no TPU.

    JAX_PLATFORMS=cpu .venv-tpu/bin/python scripts/bench/tpu_estimates.py \\
        --json scripts/bench/results/tpu-estimates.json

libtpu offers three numbers, of which one means something:

- `cost_analysis()["optimal_seconds"]`: bytes and operations over the chip's peak. Of a Mosaic call
  it is what the kernel says of itself (`pl.CostEstimate`), of every call of XLA's own without a
  cost it is -1: a step's sum is negative. It is reported, and compared with nothing.
- `estimated_cycles` in an instruction's `window_config`: of XLA's fusions only; a Mosaic call has
  none.
- the static profile of the scheduled program (`--xla_jf_dump_static_llo_profile_to`): cycles of
  each instruction of HLO, Mosaic calls too, from the bundles that were scheduled. This is what is
  compared. Its limits: copies run at the rate of the chip's DMA engines, above that of its HBM, so
  a sum below the roofline means bound by HBM; what XLA fetches ahead (copy-start) is in no
  instruction's cycles; a loop whose end depends on data counts as the profile guesses. The
  profile walks every step of every loop: it takes minutes and gigabytes for long ones, so
  the model is cut to one layer, a small vocabulary and short prompts, and a case that takes longer
  than `--seconds` has no estimate. On v5e and v5p libtpu 0.0.48.1 aborts while it writes it.

The bound of a step is the greater of its cycles and its roofline (bytes of weights and cache over
HBM's rate): both sides must read the same bytes.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

# Of a device of each: HBM bytes and peak bfloat16 operations a second, as jax 0.11.2 has them
# (jax/_src/tpu_info.py); operations a cycle: two matrix units of 256 x 256, two products a cycle
# each, which gives the clock.
CHIPS = {"v6e": (1.64e12, 9.20e14), "tpu7x": (3.70e12, 1.155e15)}
_A_CYCLE = 2 * 256 * 256 * 2 * 2
# (batch, tokens a row): decode with CONTEXT slots of cache, and prefill.
CASES = ((1, 1), (8, 1), (64, 1), (1, 512))
CONTEXT = 2048
MODEL, VOCABULARY = "Qwen3-8B", 8192


def measure(chip: str, implementation: str, batch: int, length: int) -> dict[str, Any]:
    """Compile one step and read its estimates; in a process of its own (`LIBTPU_INIT_ARGS`)."""
    folder = tempfile.mkdtemp()
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder}"
    import jax

    import jdet
    from jdet.certify import without_tpu
    from jdet.models.config import CONFIGS
    from jdet.pallas_kernels.generations import GENERATIONS
    from jdet.testing.steps import step_shapes

    config = dataclasses.replace(CONFIGS[MODEL], num_hidden_layers=1, vocab_size=VOCABULARY)
    context = CONTEXT if length == 1 else length
    step, shapes = step_shapes(
        config, jdet.Ops(implementation), batch=batch, length=length, context=context
    )
    [topology] = [g.topology for g in GENERATIONS if g.name == chip]
    options = jdet.compiler_options(implementation, "tpu")
    jitted = jax.jit(step, donate_argnums=2, compiler_options=options)
    compiled = jitted.lower(*without_tpu(topology)(shapes)).compile()
    cycles = {}
    for path in Path(folder).iterdir():
        text = path.read_text()
        found = re.findall(r'op_name: "(.*)"|cycles: (\d+)|equivalent_hlos: (\d+)', text)
        name, count, times = (next(filter(None, group)) for group in found)
        cycles[name] = int(count) * int(times)
    # Read by both sides: weights of the layer and the head (of the embedding, rows), the cache.
    decoder, _, cache, _, _ = shapes
    layers = jax.tree.leaves((decoder.layers, decoder.norm, decoder.lm_head))
    size = sum(x.size * x.dtype.itemsize for x in layers)
    size += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) if length == 1 else 0
    bandwidth, peak = CHIPS[chip]
    per_token = 2 * sum(x.size for x in jax.tree.leaves(decoder.layers))
    seconds = max(size / bandwidth, per_token * batch * length / peak)
    roofline = seconds * peak / _A_CYCLE
    total = sum(cycles.values())
    largest = sorted(cycles.items(), key=lambda pair: -pair[1])[:12]
    return {
        "cycles": total,
        "roofline_cycles": round(roofline),
        "bound_cycles": max(total, round(roofline)),
        "optimal_seconds": (compiled.cost_analysis() or {}).get("optimal_seconds"),
        "largest": dict(largest),
    }


def case(chip: str, implementation: str, shape: tuple[int, int], seconds: int) -> dict[str, Any]:
    """`measure` in a child; what went wrong, in words, where it gives nothing."""
    command = [sys.executable, __file__, "--case", chip, implementation, *map(str, shape)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"cycles": None, "why": f"the profile took more than {seconds} s"}
    if done.returncode:
        return {"cycles": None, "why": f"libtpu or the compile failed: {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--chips", default="v6e,tpu7x", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--seconds", type=int, default=300, help="at most, a case")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        chip, implementation, batch, length = args.case
        print(json.dumps(measure(chip, implementation, int(batch), int(length))))
        return
    chips = args.chips.split(",")
    if unknown := set(chips) - set(CHIPS):
        parser.error(f"--chips: {', '.join(unknown)}; allowed: {', '.join(CHIPS)}")
    import jdet

    report: dict[str, Any] = {
        "command": "scripts/bench/tpu_estimates.py " + " ".join(sys.argv[1:]),
        "what": "the compiler's static profile, no TPU ran; see the script for what it counts",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "fingerprint": jdet.Ops("mosaic_tpu").fingerprint,
        "model": f"{MODEL}, one layer, vocabulary of {VOCABULARY}, bfloat16",
        "context": CONTEXT,
        "estimates": [],
    }
    for chip in chips:
        for shape in CASES:
            ours, plain = (case(chip, name, shape, args.seconds) for name in ("mosaic_tpu", "xla"))
            row: dict[str, Any] = {"chip": chip, "batch": shape[0], "length": shape[1]}
            if ours["cycles"] and plain["cycles"]:
                row["ratio_of_cycles"] = round(ours["cycles"] / plain["cycles"], 3)
                row["ratio_of_bounds"] = round(ours["bound_cycles"] / plain["bound_cycles"], 3)
            report["estimates"].append({**row, "mosaic_tpu": ours, "xla": plain})
            print(json.dumps(report["estimates"][-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
