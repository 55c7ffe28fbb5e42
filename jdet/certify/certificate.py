"""What `certify` found, as data: verdicts, the compositions that occurred, JSON, a table."""

import dataclasses
import json
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

PASS, FAIL, NOT_TESTED = "PASS", "FAIL", "NOT TESTED"

# What the bits do not depend on, by name (README, "What is guaranteed").
GUARANTEES = {
    "G1": "batch size",
    "G2": "row, neighbours, their lengths and sampling",
    "G3": "padding and shapes, NaN in unused slots",
    "G4": "how a prompt was cut into chunks",
    "G5": "prefix cache: hit or miss",
    "G6": "prefill, decode or scoring",
    "G7": "preemption, pages, arrivals, cancelled mates",
    "G8": "number of devices",
    "G9": "run, process, compile",
    "G10": "mates of a mixture of experts",
    "G11": "which card of an architecture",
}


@dataclasses.dataclass
class Result:
    """One guarantee.

    Attributes:
      name: "G1".."G11".
      asked: whether the certificate's verdict waits for it.
      reason: why it was not tested.
      trials: cases that ran.
      compositions: different batches that the engine formed in one step, with a compared request
        in it around which what the guarantee is about occurred. The padded shape, the requests
        in their rows, the parts of prompts that were read and whether what is before them came
        from the prefix cache tell batches apart; how far the generating rows are does not. A
        call of `generate` or `score` is one.
      comparisons: requests of them that were compared with their run alone.
      occurred: those around which the engine formed what the guarantee is about.
      mismatches: comparisons with other bits.
      rows, lengths: smallest and largest batch (requests in one step) and prompt compared.
      cuts: different ways in which a prompt was cut into chunks.
      hits: requests that found a beginning of theirs in the prefix cache.
      preemptions: of compared requests.
      first: of the first failure: what differs, how small it was shrunk, and the case.
      seconds: spent on its trials.
    """

    name: str
    asked: bool = True
    reason: str = ""
    trials: int = 0
    compositions: int = 0
    comparisons: int = 0
    occurred: int = 0
    mismatches: int = 0
    rows: tuple[int, int] | None = None
    lengths: tuple[int, int] | None = None
    cuts: int = 0
    hits: int = 0
    preemptions: int = 0
    first: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """PASS only where what it is about occurred and nothing differed."""
        if self.mismatches:
            return FAIL
        return PASS if self.occurred and not self.reason else NOT_TESTED

    def to_json(self) -> dict[str, Any]:
        """Plain values, the verdict and what it is about."""
        own = {"verdict": self.verdict, "about": GUARANTEES[self.name]}
        return {**dataclasses.asdict(self), **own, "seconds": round(self.seconds, 1)}


@dataclasses.dataclass
class Certificate:
    """What `certify` found; `str()` says it in a line.

    Attributes:
      subject: model, implementation, dtype, contract, fingerprint.
      environment: device, versions, compiler options, XLA_FLAGS.
      settings: seed, minutes, batch, guarantees: what a replay needs; by the command, also the
        model's source and the command.
      guarantees: all eleven.
      schedules: of each op, or {"reason": why not}.
      control: what plain XLA did with the same compositions.
      heat: [requests in a step, tokens of the prompt, comparisons, mismatches].
      layers: of the first failure, where in the model it arises.
      compositions: of all guarantees together, each batch counted once.
      sha256: of the pool's tokens and log-probs alone: compare it with another card's.
      stopped: why it ended early.
      seconds: wall clock.
    """

    subject: dict[str, Any]
    environment: dict[str, Any]
    settings: dict[str, Any]
    guarantees: dict[str, Result]
    schedules: dict[str, Any] = dataclasses.field(default_factory=dict)
    control: dict[str, Any] = dataclasses.field(default_factory=dict)
    heat: list[list[int]] = dataclasses.field(default_factory=list)
    layers: dict[str, Any] | None = None
    compositions: int = 0
    sha256: str = ""
    stopped: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """PASS: all that was asked passed, and plain XLA failed the same. FAIL: some bit differs.

        INCOMPLETE: nothing differs, but something asked for was not tested, it was stopped, or
        plain XLA passed too, so that the compositions could not have told.
        """
        asked = [r.verdict for r in self.guarantees.values() if r.asked]
        parts = [*asked, self.schedules.get("verdict", PASS)]
        if FAIL in parts:
            return FAIL
        told = self.control.get("verdict") == "DIFFERS"
        done = told and not self.stopped and all(p == PASS for p in parts) and asked
        return PASS if done else "INCOMPLETE"

    @property
    def passed(self) -> bool:
        """Whether everything asked for passed."""
        return self.verdict == PASS

    @property
    def trials(self) -> int:
        """Of all guarantees together."""
        return sum(r.trials for r in self.guarantees.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values; `certify(replay=...)` takes them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        results = [r.to_json() for r in self.guarantees.values()]
        told = {"verdict": self.verdict, "said": str(self), "trials": self.trials}
        return {**told, **fields, "guarantees": results, "seconds": round(self.seconds, 1)}

    def __str__(self) -> str:
        s, compared = self.subject, sum(r.comparisons for r in self.guarantees.values())
        wrong = sum(r.mismatches for r in self.guarantees.values())
        stopped = f"; stopped early: {self.stopped}" if self.stopped else ""
        return (
            f"{self.verdict}: {s['model']} on {s['implementation']}, {self.compositions} "
            f"compositions in {self.trials} trials, {compared} requests compared with their run "
            f"alone, {wrong} with other bits{stopped}"
        )

    def table(self) -> Group:
        """The verdicts, for `rich`."""
        table = Table()
        for column in ("", "not on", "verdict", "formed", "compared", "differ", "what ran"):
            table.add_column(column, overflow="fold", no_wrap=column in ("", "formed", "differ"))
        style = {PASS: "green", FAIL: "bold red", NOT_TESTED: "dim"}
        for r in self.guarantees.values():
            counts = [str(n) for n in (r.compositions, r.occurred, r.mismatches)]
            if not r.trials:
                counts = ["", "", ""]
            what = r.reason or ran(r)
            verdict = Text(r.verdict, style[r.verdict])
            table.add_row(r.name, GUARANTEES[r.name], verdict, *counts, Text(what))
        lines = [Text(str(self))]
        lines += [Text(f"{r.name}: {r.first['said']}") for r in self.guarantees.values() if r.first]
        if self.layers:
            lines.append(Text(f"layers: {self.layers['said']}"))
        lines.append(Text(f"schedules: {schedules_said(self.schedules)}"))
        lines.append(Text(f"plain XLA: {self.control.get('said', 'not run')}"))
        if self.sha256:
            lines.append(Text(f"sha256 of the runs alone, for another card: {self.sha256}"))
        return Group(table, *lines)

    def dumps(self) -> str:
        """`to_json` as text."""
        return json.dumps(self.to_json(), indent=1, default=str)


def ran(r: Result) -> str:
    """What the engine did, in words."""
    parts = []
    if r.rows:
        parts.append(f"{_range(r.rows)} in a step")
    if r.lengths:
        parts.append(f"prompts of {_range(r.lengths)}")
    parts += [f"{r.cuts} ways to cut"] if r.cuts > 1 else []
    parts += [f"hits: {r.hits}"] if r.hits else []
    parts += [f"preemptions: {r.preemptions}"] if r.preemptions else []
    return ", ".join(parts)


def _range(pair: tuple[int, int]) -> str:
    low, high = pair
    return str(low) if low == high else f"{low} to {high}"


def schedules_said(found: dict[str, Any]) -> str:
    """The self-test in a line."""
    if "reason" in found:
        return f"{found['verdict']}: {found['reason']}"
    if not found:
        return "not run"
    ops = [f"{o['op']} {o['compared']} of {o['schedules']}" for o in found["ops"]]
    wrong = [d for o in found["ops"] for d in o["differ"]]
    told = f"; other bits: {'; '.join(wrong)}" if wrong else ", the same bits"
    out = [f"{o['op']} ({', '.join(o['left_out'])})" for o in found["ops"] if o["left_out"]]
    short = f"; no time for {'; '.join(out)}" if out else ""
    return f"{found['verdict']}: compared {', '.join(ops)}{told}{short}"
