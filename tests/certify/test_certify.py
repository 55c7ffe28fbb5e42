"""certify: the guarantees tried on a tiny model, and planted faults that it must name."""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdet
from jdet.certify import Certificate, campaign, certify, runs
from jdet.certify.cases import COMPOSED, Case, Sent, engine_config, make_case, make_pool
from jdet.certify.page import render
from jdet.certify.runs import Bench
from jdet.certify.schedules import self_test
from jdet.certify.second_process import Recipe, SecondProcess, bits_of
from jdet.certify.shrinking import shrink
from jdet.cli import main
from jdet.engine.device import Device
from jdet.engine.request import Request
from jdet.engine.scheduler import Plan, Scheduler
from jdet.models.config import DecoderConfig
from jdet.testing import small_config, tiny_config

BATCH = 6
COUNTS = {"G1": 2, "G2": 3, "G3": 3, "G4": 3, "G5": 3, "G6": 5, "G7": 2}


@functools.cache
def model() -> Any:
    config = DecoderConfig.from_hf({**tiny_config(), "num_hidden_layers": 1})
    return jdet.random_model(config)


def known(counts: dict[str, int], **first: Any) -> dict[str, Any]:
    """A report to replay: so many trials of each guarantee, whatever time that takes."""
    results = [
        {"name": name, "trials": counts.get(name, 0), "first": first.get(name)} for name in COMPOSED
    ]
    settings = {"guarantees": list(counts), "seed": 3, "batch": BATCH}
    return {"settings": settings, "guarantees": results}


def run(counts: dict[str, int], **first: Any) -> Certificate:
    return certify(model(), minutes=60, replay=known(counts, **first), progress=False)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Schedules are tested by themselves, and shrinking has five seconds a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "self_test", lambda model, more: [])
        patch.setattr(campaign, "_SHRINK", 0.0)
        yield


@pytest.fixture(scope="module")
def clean(quick: None) -> Certificate:
    return run(COUNTS)


def test_a_sound_engine_passes_and_plain_xla_does_not(clean: Certificate) -> None:
    assert clean.passed, str(clean)
    for name, count in COUNTS.items():
        found = clean.guarantees[name]
        assert (found.verdict, found.trials, found.mismatches) == ("PASS", count, 0)
        assert 0 < found.occurred <= found.comparisons
        # Of what is not a call: several batches a trial.
        assert found.compositions > count
    assert clean.guarantees["G5"].hits > 0 and clean.guarantees["G7"].preemptions > 0
    assert clean.control["verdict"] == "DIFFERS" and clean.control["mismatches"] > 0
    for name, why in (("G8", "one device"), ("G9", "by name"), ("G10", "mixture"), ("G11", "sha")):
        assert clean.guarantees[name].verdict == "NOT TESTED"
        assert why in clean.guarantees[name].reason
    rows, lengths = {cell[0] for cell in clean.heat}, {cell[1] for cell in clean.heat}
    assert max(rows) > 4 and {16, 257} & lengths
    assert sum(c[2] for c in clean.heat) == sum(r.comparisons for r in clean.guarantees.values())


def test_a_replay_composes_the_same_again(clean: Certificate) -> None:
    told = json.loads(clean.dumps())
    again = certify(model(), minutes=60, replay=told, progress=False)
    assert again.sha256 == clean.sha256 and again.heat == clean.heat
    other = {**told, "environment": copy.deepcopy(told["environment"])}
    other["environment"]["device"]["kind"] = "another"
    assert certify_g11(other).verdict == "PASS"
    assert certify_g11({**other, "sha256": "0"}).verdict == "FAIL"
    assert "same device" in certify_g11(told).reason


def test_mates_of_a_mixture_of_experts() -> None:
    config = DecoderConfig.from_hf(small_config("qwen3_moe", vocab_size=160))
    mixture = jdet.random_model(dataclasses.replace(config, mlp_only_layers=(1,)))
    found = certify(mixture, minutes=60, replay=known({"G10": 2}), progress=False)
    g10 = found.guarantees["G10"]
    assert (g10.verdict, g10.trials, g10.mismatches) == ("PASS", 2, 0)
    assert g10.occurred > 4 and g10.compositions > 4, "no step chose more experts than there are"
    assert found.control["verdict"] == "DIFFERS"


def test_one_composition_of_each_however_late(clean: Certificate) -> None:
    found = certify(model(), minutes=1e-6, batch=BATCH, progress=False)
    assert {n: found.guarantees[n].trials for n in COUNTS} == dict.fromkeys(COUNTS, 1)
    assert all(found.guarantees[n].verdict == "PASS" for n in COUNTS), found.dumps()
    assert found.control["verdict"] == "DIFFERS" and found.trials == len(COUNTS)


def certify_g11(other: dict[str, Any]) -> Any:
    replay = known({"G11": 1})
    found = certify(model(), minutes=60, replay=replay, other=other, progress=False)
    return found.guarantees["G11"]


def perturbed(patch: pytest.MonkeyPatch, chosen: Callable[[Plan], list[int]]) -> None:
    """The hidden states of the rows chosen come out a little larger: another path's rounding."""
    run, read = Device.run, Device._read
    rows: list[int] = []

    def watched(self: Device, plan: Plan) -> Any:
        rows[:] = chosen(plan)
        return run(self, plan)

    def changed(self: Device, *groups: Any) -> Any:
        ends, hidden = read(self, *groups)
        return (ends.at[jnp.array(rows)].multiply(1.0078125) if rows else ends), hidden

    patch.setattr(Device, "run", watched)
    patch.setattr(Device, "_read", changed)


def hit_by_another_path(patch: pytest.MonkeyPatch) -> None:
    """Peers: another attention path on a hit of the prefix cache (SGLang #34683)."""
    hits: set[Request] = set()
    reusable = Scheduler._reusable

    def remembered(self: Scheduler, request: Request) -> list[int]:
        found = reusable(self, request)
        hits.update([request] if found else [])
        return found

    patch.setattr(Scheduler, "_reusable", remembered)
    perturbed(patch, lambda plan: [i for i, c in enumerate(plan.chunks) if c.request in hits])


def splits_relative_to_the_chunk(patch: pytest.MonkeyPatch) -> None:
    """Peers: split boundaries that follow the chunk; a chunk that begins inside a split differs."""
    perturbed(patch, lambda plan: [i for i, c in enumerate(plan.chunks) if c.start % 64])


def recomputed_in_another_shape(patch: pytest.MonkeyPatch) -> None:
    """Peers: what a preempted request had generated is read again by prefill's kernel."""

    def again(plan: Plan) -> list[int]:
        chunks = enumerate(plan.chunks)
        return [i for i, c in chunks if c.start + c.length > len(c.request.prompt)]

    perturbed(patch, again)


def noise_by_slot(patch: pytest.MonkeyPatch) -> None:
    """Peers: one key for the batch, so that a row's place decides its noise."""
    rows = Device._set_sampling

    def seeded(self: Device, slot: int, request: Request) -> None:
        own = dataclasses.replace(request.params, seed=slot)
        changed = dataclasses.replace(request, params=own)
        rows(self, slot, changed)

    patch.setattr(Device, "_set_sampling", seeded)


def scores_by_another_path(patch: pytest.MonkeyPatch) -> None:
    """Peers: a trainer's forward pass beside a sampler's (two kernels, two orders)."""
    score = runs.score

    def other(*args: Any, **kwargs: Any) -> list[list[float]]:
        found = score(*args, **kwargs)
        return [[float(np.nextafter(np.float32(x), np.float32(0))) for x in row] for row in found]

    patch.setattr(runs, "score", other)


@pytest.mark.parametrize(
    ("plant", "names", "spared"),
    [
        (hit_by_another_path, "G5", "G4"),
        (splits_relative_to_the_chunk, "G4", "G1"),
        (recomputed_in_another_shape, "G7", "G5"),
        (noise_by_slot, "G2", "G1"),
        (scores_by_another_path, "G6", "G4"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_planted_fault_fails_its_guarantee_and_no_other(
    plant: Callable[[pytest.MonkeyPatch], None],
    names: str,
    spared: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    found = run({names: COUNTS[names], spared: 2})
    assert found.guarantees[names].verdict == "FAIL" and found.verdict == "FAIL"
    assert found.guarantees[spared].verdict == "PASS"
    first = found.guarantees[names].first
    assert first is not None and len(first["case"]["requests"]) <= first["requests"]
    # The smallest reproduction is one: it fails when it is run again, and is counted so.
    again = run({names: 0}, **{names: first})
    assert again.guarantees[names].mismatches > 0


def test_the_smallest_reproduction() -> None:
    """Only two mates matter, and only a prompt of more than four tokens."""
    greedy = jdet.SamplingParams(temperature=0, max_tokens=2)
    sent = [Sent(tuple(range(10 * i, 10 * i + 10)), greedy, arrive=i) for i in range(8)]

    def fails(case: Case, place: int) -> bool:
        starts = {s.prompt[0] for s in case.requests}
        target = case.requests[place].prompt
        return {20, 60} <= starts and target[0] == 50 and len(target) > 4

    small, place, tried = shrink(Case("G2", 0, tuple(sent)), 5, fails, lambda: True)
    assert [s.prompt for s in small.requests] == [(20,), (50, 51, 52, 53, 54), (60,)]
    assert place == 1 and tried < 60 and not any(s.arrive for s in small.requests)
    assert Case.from_json(json.loads(json.dumps(small.to_json()))) == small
    left = iter([True, True, False])
    assert shrink(Case("G2", 0, tuple(sent)), 5, fails, lambda: next(left))[2] == 2


def test_cases_are_functions_of_the_seed() -> None:
    pool = make_pool(1, 160)
    assert {len(p) for p, _ in pool.all} >= {1, 15, 16, 17, 63, 64, 65, 255, 256, 257}
    make = functools.partial(make_case, pool=pool, batch=BATCH, tokens_of=lambda n: [1] * 12)
    for name in COMPOSED:
        cases = [make(name, i, seed=1) for i in range(30)]
        assert cases == [make(name, i, seed=1) for i in range(30)]
        assert cases != [make(name, i, seed=2) for i in range(30)]
        assert all(c.guarantee == name and c.requests for c in cases)


@pytest.mark.parametrize("batch", [4, 6, 7, 8, 9, 16, 31, 64, 65, 1024])
def test_a_load_fills_every_page_before_any_request_wants_another(batch: int) -> None:
    pool = make_pool(0, 160)
    for index in range(20):
        case = make_case("G7", index, seed=0, pool=pool, batch=batch, tokens_of=lambda n: [])
        first = [s for s in case.requests if s.arrive == 0]
        assert len(first) <= batch
        # What admission asks for: room for one token more.
        pages = sum(len(s.prompt) // 16 + 1 for s in first)
        assert pages == engine_config(batch, prefix_caching=False).num_pages
        *older, youngest = first
        assert len(youngest.prompt) == 15
        grow = [s for s in older if len(s.prompt) % 16 + s.sampling.max_tokens > 16]
        assert {len(s.prompt) for s in grow} <= {15} and len(grow) <= 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "ran out of memory"),
        (KeyboardInterrupt(), "interrupted"),
    ],
    ids=["memory", "Ctrl-C"],
)
def test_stopped_half_way_it_tells_what_was_done(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ran = Bench.run, []

    def full(self: Bench, case: Case) -> Any:
        ran.append(case.guarantee)
        if ran.count("G4") == 2:
            raise error
        return real(self, case)

    monkeypatch.setattr(Bench, "run", full)
    found = run({"G1": 1, "G4": 3, "G7": 2})
    assert said in found.stopped and found.verdict == "INCOMPLETE" and not found.passed
    assert [found.guarantees[g].trials for g in ("G1", "G4", "G7")] == [1, 1, 0]
    assert said in found.guarantees["G7"].reason and said in str(found)


def test_where_in_the_model(clean: Certificate) -> None:
    """Of plain XLA, the first failure is followed through the layers' keys and values."""
    plain = model().with_ops(implementation="xla")
    found = certify(plain, minutes=60, replay=known({"G1": 2}), progress=False)
    assert found.guarantees["G1"].verdict == "FAIL" and found.layers is not None
    assert len(found.layers["ulps"]) == model().config.num_hidden_layers
    # From the first layer that differs on, all do.
    differs = [at is not None for at in found.layers["first"]]
    assert differs == sorted(differs)
    page = render(json.loads(found.dumps()), "r.json")
    assert "FAIL" in page and "jdet certify --replay r.json" in page and "<svg" in page
    assert 'class="wrong"' in page and "http" not in page.split("<body>")[1]
    good = render(clean.to_json())
    assert "PASS" in good and 'class="wrong"' not in good and "<svg" not in good


def test_schedules_agree_and_a_bad_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from jdet.pallas_kernels.matmul import portable

    left = iter([True] * 2 + [False])
    found = {op.op: op for op in self_test(model(), lambda new: next(left))}
    assert set(found) == {"matmul", "attention"}
    # Every op has its turn before one has its second.
    assert all(op.compared == op.schedules > 1 and not op.differ for op in found.values())
    assert [(len(op.cases), len(op.left_out)) for op in found.values()] == [(1, 5), (1, 1)]
    # Only what has not been compared at all: once each.
    assert all(op.compared == op.schedules for op in self_test(model(), lambda new: new))
    assert all(op.compared == 0 for op in self_test(model(), lambda new: False))
    tiled = portable.dot_tiled
    monkeypatch.setattr(
        portable,
        "dot_tiled",
        lambda x, w, tile: {
            8: lambda: tiled(x, w[:1, :1], tile),
            16: lambda: tiled(x[:, ::-1], w[:, ::-1], tile),
            64: lambda: tiled(x, w, tile),
        }[tile](),
    )
    left = iter([True, False])
    bad = next(op for op in self_test(model(), lambda new: next(left)) if op.op == "matmul")
    lost, other = bad.differ
    assert "tiled 8 does not run: " in lost and other.endswith(": tiled 16")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"guarantees": ["G12"]}, "allowed: G1, G2"),
        ({"guarantees": []}, "allowed: G1, G2"),
        ({"minutes": 0}, "minutes=0; allowed: above 0"),
        ({"batch": 2}, "batch=2; allowed: integers from 4"),
        ({"seed": -1}, "seed=-1; allowed: integers from 0"),
        ({"trials": 0}, "trials=0; allowed: from 1"),
        ({"replay": {"verdict": "PASS"}}, "replay: not what"),
        ({"layers": 2}, "layers=2; allowed: with random_weights"),
    ],
)
def test_bad_input(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        certify(model(), **given)
    with pytest.raises(ValueError, match="unknown shape"):
        certify("Qwen9", random_weights=True)
    with pytest.raises(ValueError, match="layers=37; allowed: 1 to 36"):
        certify("Qwen3-8B", random_weights=True, layers=37)


def test_a_second_process() -> None:
    folder = Path(__file__).parents[1] / "goldens" / "tiny_qwen3"
    recipe = Recipe(str(folder), False, "bfloat16", "portable")
    pool = make_pool(0, 160)
    sent = [Sent(*pool.short[1]), Sent(*pool.short[-1])]
    with (
        SecondProcess(recipe, sent, BATCH) as child,
        SecondProcess(dataclasses.replace(recipe, model="no.gguf"), sent, BATCH) as lost,
    ):
        assert "not done in the time" in child.results(0)
        bench = Bench(recipe.make(), BATCH)
        own = [bench.alone(s.prompt, s.sampling) for s in sent]
        assert child.results(300) == [bits_of(c.token_ids, c.logprobs) for c in own]
        assert "failed with status 1: " in lost.results(300)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["certify", *arguments])
    out = capsys.readouterr()
    return status, out.out + out.err


def test_the_command(
    clean: Certificate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def done(*args: Any, **kwargs: Any) -> Certificate:
        asked.append((args, kwargs))
        return answers.pop(0)

    monkeypatch.setattr("jdet.certify.certify", done)
    source = {"model": "some.gguf", "shape": None}
    sound = dataclasses.replace(clean, settings={**clean.settings, "source": source})
    answers = [sound, dataclasses.replace(sound, stopped="interrupted"), sound]
    report, page = tmp_path / "r.json", tmp_path / "r.html"
    files = ["--json", str(report), "--html", str(page)]
    status, told = printed(capsys, "--guarantees", "G1, G4", "--minutes", "2", *files)
    assert status == 0 and "PASS: qwen3" in told and "G4" in told
    assert asked[0][1]["guarantees"] == ["G1", "G4"] and asked[0][1]["minutes"] == 2
    assert json.loads(report.read_text())["verdict"] == "PASS"
    assert f"--replay {report}" in page.read_text()
    status, told = printed(capsys, "--shape", "Qwen3-8B", "--layers", "4")
    assert status == 1 and "INCOMPLETE" in told and asked[1][0] == ("Qwen3-8B",)
    assert asked[1][1]["random_weights"] and asked[1][1]["layers"] == 4
    status, _ = printed(capsys, "--replay", str(report))
    assert asked[2][0] == ("some.gguf",) and asked[2][1]["replay"]["sha256"] == clean.sha256
    page.write_text("{}")
    for given, told in (
        (["--model", "a", "--shape", "b"], "give one of them"),
        (["--replay", str(report), "--seed", "1"], "from the report"),
        (["--replay", str(tmp_path / "none")], "no such file"),
        (["--other", str(page)], "not a report of jdet certify"),
        (["--json", str(tmp_path / "no" / "r.json")], "there is no folder"),
    ):
        status, said = printed(capsys, *given)
        assert status == 2 and told in said
