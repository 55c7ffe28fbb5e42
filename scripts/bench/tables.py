"""The Markdown tables of the README and of docs/, made from the committed results.

    python scripts/bench/tables.py

Each table stands in one page between `<!-- table NAME -->` and `<!-- end -->`; a test
compares them, so that no figure there can differ from its file.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo(name: str) -> str:
    """One run of `jdet demo`."""
    data = _load(name)
    labels = {
        "completions": "completions",
        "unique": "unique completions",
        "first_divergence": "first token at which they part",
        "distinct_logprobs": "distinct bit patterns of log-probs",
        "max_logprob_diff": "largest log-prob difference",
        "tokens_per_second": "tokens per second",
    }

    def cell(value: Any) -> str:
        if value is None:
            return "never"
        return f"{value:.3g}" if isinstance(value, float) and value < 1 else f"{value:.0f}"

    rows = [[text, cell(data["xla"][k]), cell(data["jdet"][k])] for k, text in labels.items()]
    return _table(["", "plain XLA", "jdet"], rows)


def cpu() -> str:
    """Decode step and prefill on a CPU."""
    rows = [
        [
            f"{r['what']}, {r['dtype']}, {r['batch']} x {r['length']}",
            f"{r['ours_ms']:.1f}",
            f"{r['xla_ms']:.1f}",
            f"{r['ratio']:.2f}",
        ]
        for r in _load("cpu-model-4.json")["rows"]
    ]
    return _table(["", "jdet ms", "plain XLA ms", "ratio"], rows)


def matmul() -> str:
    """Ratios of the Hopper matmul to plain XLA."""
    rows = _load("h100-matmul.json")["rows"]
    ops = list(dict.fromkeys(r["op"] for r in rows))
    sizes = sorted({r["shape"][0] for r in rows})
    ratio = {(r["op"], r["shape"][0]): f"{r['ratio']:.2f}" for r in rows}
    return _table(["M", *map(str, sizes)], [[op, *(ratio[op, m] for m in sizes)] for op in ops])


def attention() -> str:
    """Times of the Hopper attention beside cuDNN's, on an H200."""
    found = _load("h200-attention-4.json")["rows"]
    rows = [
        [
            f"{'decode' if r['queries'] == 1 else 'prefill'}, {r['batch']} x {r['context']}",
            *(f"{r[k]:.0f}" if k in r else "" for k in ("ours_us", "cudnn_us", "floor_us")),
            *(f"{r[k]:.2f}" if k in r else "" for k in ("ratio", "paged_ratio")),
        ]
        for r in sorted(found, key=lambda r: (r["queries"] > 1, r["batch"], r["context"]))
    ]
    return _table(["", "jdet us", "cuDNN us", "floor us", "ratio", "with pages"], rows)


def rows() -> str:
    """Times of the Hopper ops on rows beside plain XLA's."""
    lines = [
        [
            f"{r['op']}, {r['M']} x {r.get('D', r.get('V'))}",
            f"{r['ours_us']:.1f}",
            f"{r['xla_us']:.1f}",
            f"{r['floor_us']:.1f}",
            f"{r['ours_to_xla']:.2f}",
        ]
        for r in _load("h100-rows.json")["times"]
        if r["M"] in (1, 64, 256, 4096)
    ]
    return _table(["", "jdet us", "XLA us", "floor us", "ratio"], lines)


def model(name: str) -> str:
    """Decode step and prefill of a shape."""
    found = {(r["what"], r["batch"], r["length"]): r for r in _load(name)["rows"]}
    lines = []
    for _, r in sorted(found.items()):
        best = min(r[k] for k in ("xla_ms", "xla_cudnn_ms") if k in r)
        figures = (r["ours_ms"], best, r["floor_ms"])
        lines.append(
            [
                f"{r['what']}, {r['batch']} x {r['length']}",
                *(f"{v:.2f}" for v in figures),
                f"{r['ratio']:.2f}",
                f"{100 * r['share_of_floor']:.0f} %",
            ]
        )
    return _table(["", "jdet ms", "XLA ms", "floor ms", "ratio", "of the floor"], lines)


def engine() -> str:
    """The engine on a Qwen3-8B shape, on our ops and on plain XLA with cuDNN's attention."""
    lines = []
    for name in ("h200-engine-xla-1024.json", "h200-engine-xla-mixed.json"):
        for r in _load(name)["rows"]:
            ours = "mosaic_gpu" in r["implementation"]
            lines.append(
                [
                    f"{r['load'].replace(':', ' in, ')} out, {'jdet' if ours else 'XLA'}",
                    f"{r['output_tokens_per_second']:.0f}",
                    f"{r['seconds']:.1f}",
                    f"{r['first_token_median_s']:.1f}, {r['first_token_last_s']:.1f}",
                    f"{r['full_step_ms']:.2f}",
                    f"{r['floor_ms']:.2f}",
                    f"{100 * r['share_of_floor']:.0f} %",
                    f"{100 * r['busy']:.1f} %",
                ]
            )
    header = ["", "output tokens/s", "s", "first token s (median, last)"]
    return _table([*header, "step ms", "floor ms", "of the floor", "busy"], lines)


def grouped() -> str:
    """Times of the Hopper grouped matmuls beside XLA's ragged dot and JAX's Hopper kernel."""
    sides = ("ours_us", "ragged_dot_us", "bundled_us", "floor_us")
    lines = [
        [
            f"{r['op'].removeprefix('grouped_')}, {r['tokens']}",
            *(f"{r[side]:.0f}" if side in r else "" for side in sides),
        ]
        for r in _load("h100-grouped.json")["times"]
    ]
    return _table(["", "jdet us", "ragged_dot us", "JAX's kernel us", "floor us"], lines)


def _hashes(name: str) -> dict[str, str]:
    """Hashes of results on fixed inputs, by what was computed."""
    data = _load(name)
    if "checks" not in data:
        return data["sha256"]
    found = [dict(row) for row in data["checks"] if "sha256" in row]
    for row in found:
        for measured in ("calls", "wrong", "seconds"):
            row.pop(measured, None)
    return {repr({k: v for k, v in r.items() if k != "sha256"}): r["sha256"] for r in found}


def cards() -> str:
    """Results of the Hopper ops on fixed inputs that an H100 and an H200 have hashed."""
    lines = []
    for ops, first, second in (
        ("matmul", "h100-check-matmul-all", "h200-check-matmul-quick"),
        ("gated_matmul", "h100-check-gated", "h200-check-matmul-quick"),
        ("attention", "h100-check-attention", "h200-check-attention"),
        ("rms_norm, log_normalizer", "h100-check-rows", "h200-check-rows"),
        ("qkv_heads", "h100-check-heads", "h200-check-heads"),
    ):
        a, b = _hashes(f"{first}.json"), _hashes(f"{second}.json")
        both = a.keys() & b.keys()
        lines.append([ops, str(len(both)), str(sum(a[k] == b[k] for k in both))])
    return _table(["", "hashed on both", "equal"], lines)


def transform() -> str:
    """A model as published and under `jdet.batch_invariant`, on an H200."""
    whats = {
        "tunix_qwen3": "{batch} prompts of {tokens} tokens",
        "tunix_qwen3_decode": "a decode step behind {cached tokens} tokens, batch {batch}",
        "tunix_qwen3_steps": "a loop of {steps} steps in one program, batch {batch}",
    }
    lines = [
        [
            whats[row["model"]].format(batch=at["batch"], **row["config"]),
            f"{at['run_ratio']:.2f}",
            f"{at['compile_ratio']:.2f}",
        ]
        for row in _load("h200-foreign-models-times.json")["rows"]
        for at in row["times"]
    ]
    return _table(["", "to run", "to compile"], lines)


def tables() -> dict[str, str]:
    """Every table by its name in the pages."""
    return {
        "demo-cpu": demo("demo-cpu.json"),
        "demo-h200": demo("h200-demo-1000.json"),
        "cpu": cpu(),
        "matmul": matmul(),
        "attention": attention(),
        "rows": rows(),
        "cards": cards(),
        "model-h200": model("h200-qwen3-8b-5.json"),
        "model-h100": model("h100-qwen3-8b-first.json"),
        "mixture": model("h200-qwen3-30b-a3b-5.json"),
        "engine": engine(),
        "grouped": grouped(),
        "transform-h200": transform(),
    }


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"<!-- table {name} -->\n{table}\n<!-- end -->\n")
