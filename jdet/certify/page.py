"""A certificate as one HTML page that needs nothing else."""

import bisect
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from jdet.certify.certificate import FAIL, PASS, Result, ran

# First values of the bins of prompts and batches: edges of tiles, chunks and splits apart.
_LENGTHS = (1, 2, 7, 10, 16, 17, 32, 63, 66, 128, 255, 258)
_ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 64, 65)
_WIDTH = 480


def render(report: Mapping[str, Any], report_file: str = "") -> str:
    """The page of what `Certificate.to_json` gives; `report_file` is where that was written."""
    source = importlib.resources.files("jdet.certify").joinpath("page.html")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True
    )
    template = environment.from_string(source.read_text(encoding="utf-8"))
    s = report["settings"]
    again = f"jdet certify --replay {report_file or 'REPORT.json'}"
    return template.render(
        r=report,
        mark=_mark,
        what=lambda g: ran(_result(g)),
        heat=_heat(report["heat"]),
        plot=_plot(report["layers"]["ulps"]) if report["layers"] else None,
        failures=[g for g in report["guarantees"] if g["first"]],
        command=f"{again}    # seed {s['seed']}, at most {s['batch']} requests at once",
        facts=_facts(report),
    )


def _mark(verdict: str) -> str:
    return verdict if verdict in (PASS, FAIL) else "OPEN"


def _result(g: Mapping[str, Any]) -> Result:
    own = {k: v for k, v in g.items() if k not in ("verdict", "about")}
    return Result(**own)


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    e, s = report["environment"], report["subject"]
    device = e["device"]
    contract = ", ".join(f"{k} {v}" for k, v in s["contract"].items())
    options = ", ".join(f"{k}={v}" for k, v in e["compiler_options"].items())
    return [
        ("fingerprint", s["fingerprint"]),
        ("contract", contract),
        ("implementation", s["implementation"]),
        ("model", f"{s['layers']} layers of {s['hidden_size']}, {s['dtype']}"),
        ("device", f"{device['count']} x {device['kind']} ({device['platform']})"),
        ("host", f"{device['host_cpu']}, {device['host_cores']} cores"),
        ("versions", ", ".join(f"{k} {v}" for k, v in e["versions"].items())),
        ("compiler options", options or "none"),
        ("XLA_FLAGS", ", ".join(f"{k}={v}" for k, v in e["xla_flags"].items()) or "none"),
        ("compilation cache", "a folder is set" if e.get("compilation_cache") else "none"),
        ("time", f"{report['seconds']} s of {report['settings']['minutes']} min"),
    ]


def _names(first: Sequence[int]) -> list[str]:
    ends = [*(n - 1 for n in first[1:]), None]
    names = zip(first, ends, strict=True)
    return [f"{a}+" if b is None else str(a) if a == b else f"{a}–{b}" for a, b in names]


def _heat(cells: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Comparisons in bins; rows of the map that hold none above the largest are left out."""
    count = [[0] * len(_LENGTHS) for _ in _ROWS]
    wrong = [[0] * len(_LENGTHS) for _ in _ROWS]
    for rows, length, compared, differ in cells:
        i, j = bisect.bisect(_ROWS, rows) - 1, bisect.bisect(_LENGTHS, length) - 1
        count[i][j] += compared
        wrong[i][j] += differ
    most = max((n for line in count for n in line), default=0)
    last = max((i for i, line in enumerate(count) if any(line)), default=-1)
    lines = [
        {
            "name": name,
            "cells": [
                {"count": n, "wrong": w, "shade": round(0.15 + 0.75 * _scale(n, most), 2)}
                for n, w in zip(count[i], wrong[i], strict=True)
            ],
        }
        for i, name in enumerate(_names(_ROWS)[: last + 1])
    ]
    return {"columns": _names(_LENGTHS), "rows": lines}


def _scale(n: int, most: int) -> float:
    return math.log1p(n) / math.log1p(most) if most else 0.0


def _plot(ulps: Sequence[float]) -> dict[str, Any]:
    """Bars over the layers, the distance in a logarithmic scale."""
    top = max(math.log2(1 + u) for u in ulps) or 1.0
    step = (_WIDTH - 70) / len(ulps)

    def height(u: float) -> float:
        # What does not differ is still there to see.
        return round(168 - 145 * math.log2(1 + u) / top, 1)

    bars = [
        {"layer": i, "ulps": u, "x": round(65 + i * step, 1), "y": height(u)}
        for i, u in enumerate(ulps)
    ]
    marks = [2.0**e for e in range(0, 129, max(1, math.ceil(top / 4)))]
    every = max(1, len(ulps) // 8)
    return {
        "width": _WIDTH,
        "bar": round(max(1.0, step * 0.7), 1),
        "bars": bars,
        "ticks": [
            (height(m), f"{m:.0f}" if m < 1e5 else f"{m:.0e}")
            for m in marks
            if math.log2(1 + m) <= top
        ],
        "names": [(round(65 + (i + 0.35) * step, 1), str(i)) for i in range(0, len(ulps), every)],
    }
