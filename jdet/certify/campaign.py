"""The instruments of `certify` in turn: they share one engine's programs and one budget of time."""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
from tqdm import tqdm

from jdet.certify.cases import COMPOSED, LONGEST, Case, Needle, Sent, make_case, make_pool
from jdet.certify.certificate import FAIL, NOT_TESTED, PASS, Certificate, Result
from jdet.certify.control import control, control_cases
from jdet.certify.layers import layers_of
from jdet.certify.runs import Bench, Ran
from jdet.certify.schedules import self_test
from jdet.certify.second_process import Recipe, SecondProcess, bits_of
from jdet.certify.shrinking import shrink
from jdet.certify.tally import Tally, wider
from jdet.models.load import LanguageModel

# Shares of the time: plain XLA, the schedules, and shrinking one failure, at most.
_CONTROL, _SCHEDULES, _SHRINK = 0.15, 0.2, 0.1


class Campaign:
    """The state of one `certify`, which fills in a certificate as it goes."""

    def __init__(
        self,
        model: LanguageModel,
        recipe: Recipe | None,
        certificate: Certificate,
        start: float,
        progress: bool | None,
        replay: Mapping[str, Any] | None,
        other: Mapping[str, Any] | None,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.replay, self.other = replay, other
        self.certificate, settings = certificate, certificate.settings
        self.seed, self.batch = settings["seed"], settings["batch"]
        self.start, self.seconds = start, 60 * settings["minutes"]
        config = model.config
        if config.max_position_embeddings < LONGEST:
            raise ValueError(
                f"{model.name} has a context of {config.max_position_embeddings} tokens; certify "
                f"needs {LONGEST}, to cross a split of attention's keys"
            )
        self.pool = make_pool(self.seed, config.vocab_size)
        self.bench = Bench(model, self.batch)
        self.plain = Bench(model.with_ops(implementation="xla"), self.batch)
        self.tally = Tally()
        disable = None if progress is None else not progress
        self.bar = tqdm(total=round(self.seconds), unit="s", disable=disable, leave=False)
        self._set_aside(settings["guarantees"])

    def _set_aside(self, names: Sequence[str] | None) -> None:
        """Say of what cannot be tested here why, and of the rest whether it is asked for."""
        count = len(jax.devices())
        here = "one device only" if count == 1 else f"{count} devices, and models run on one"
        why = {"G8": f"{here}: jdet does not spread a model over devices yet"}
        if not self.model.config.num_experts:
            why["G10"] = "not a mixture of experts"
        if self.recipe is None:
            why["G9"] = "the model was not given by name, so no second process can load it"
        if self.other is None:
            why["G11"] = "needs another card: run it there and compare the sha256 below"
        for name, result in self.certificate.guarantees.items():
            result.reason = why.get(name, "")
            result.asked = not result.reason if names is None else name in names
            if not result.asked and not result.reason:
                result.reason = "not asked for"

    def run(self) -> Certificate:
        """All instruments in turn, as far as the time goes."""
        c = self.certificate
        try:
            with self.bar:
                self._instruments()
        except KeyboardInterrupt:
            c.stopped = "interrupted"
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            c.stopped = _short(error)
        for result in c.guarantees.values():
            if not result.reason and not result.occurred and not result.mismatches:
                result.reason = c.stopped or "no such composition occurred in the time"
        self.tally.finish(c)
        c.seconds = time.monotonic() - self.start
        return c

    def _instruments(self) -> None:
        g9 = self.certificate.guarantees["G9"]
        if g9.reason or self.recipe is None:
            self._others()
            return
        some = [*self.pool.short[::3], *self.pool.middle[::2], *self.pool.long[1:3]]
        sent = [Sent(*needle) for needle in some]
        with SecondProcess(self.recipe, sent, self.batch) as child:
            self._others()
            self._second_process(child)

    def _others(self) -> None:
        jobs = self.bench.compile_jobs(self.pool.all)
        with _compiling() as threads:
            ready = [threads.submit(job) for job in jobs]
            plain = [threads.submit(self.plain.compile, case) for case in self._plain_cases()]
            self._wait(ready)
            if self.replay is None:
                # However late it is: a verdict on each is worth more than many on one.
                for name in self._open():
                    self._try(self._case(name, 0))
            self._wait(plain)
        cases = control_cases(self.batch, lambda index: self._case("G1", index))
        found = control(self.plain, cases, _CONTROL * self.seconds, self._tell)
        self.certificate.control = found
        self._schedules()
        self._alone()
        for case in self._cases():
            self._try(case)

    def _plain_cases(self) -> list[Case]:
        """What has plain XLA compile all that its compositions need."""
        first = next(control_cases(self.batch, lambda index: self._case("G1", index)))
        return [Case("", 0, first.requests[:1]), first]

    def _wait(self, jobs: Sequence[Future[Any]]) -> None:
        """Until all are compiled; raises what one of them raised."""
        left = set(jobs)
        while left:
            self._tell(f"compiling: {len(jobs) - len(left)} of {len(jobs)}")
            done, left = wait(left, timeout=1)
            for job in done:
                job.result()

    def _open(self) -> list[str]:
        """The guarantees that compositions are made for."""
        results = self.certificate.guarantees
        return [n for n in COMPOSED if results[n].asked and not results[n].reason]

    def _left(self) -> float:
        return self.start + self.seconds - time.monotonic()

    def _tell(self, what: str) -> None:
        self.bar.set_description(what)
        self.bar.update(min(time.monotonic() - self.start, self.bar.total) - self.bar.n)

    def _alone(self) -> None:
        """Every request of the pool alone: what all else is compared with; and the hash."""
        digest = hashlib.sha256()
        for i, needle in enumerate(self.pool.all):
            self._tell(f"alone: {i} of {len(self.pool.all)}")
            c = self.bench.alone(*needle)
            digest.update(json.dumps(bits_of(c.token_ids, c.logprobs)).encode())
        self.certificate.sha256 = digest.hexdigest()
        if self.other is not None:
            self._other_card(self.other)

    def _tokens_of(self, needle: Needle) -> Sequence[int]:
        return self.bench.alone(*needle).token_ids

    def _case(self, name: str, index: int) -> Case:
        return make_case(
            name,
            index,
            seed=self.seed,
            pool=self.pool,
            batch=self.batch,
            tokens_of=self._tokens_of,
        )

    def _cases(self) -> Iterator[Case]:
        """Replayed ones; or new ones, of the guarantee that has had the least time."""
        results = self.certificate.guarantees
        if self.replay is not None:
            for known in self.replay["guarantees"]:
                if known["first"] and known["first"]["case"]:
                    yield Case.from_json(known["first"]["case"])
            counts = {k["name"]: k["trials"] for k in self.replay["guarantees"]}
            for name in COMPOSED:
                for index in range(counts[name] if results[name].asked else 0):
                    if self._left() <= 0:
                        return
                    yield self._case(name, index)
            return
        names = self._open()
        enough = self.certificate.settings.get("trials", float("inf"))
        while self._left() > 0:
            open_ones = [results[n] for n in names if results[n].trials < enough]
            if not open_ones:
                return
            result = min(open_ones, key=lambda r: r.seconds)
            yield self._case(result.name, result.trials)

    def _try(self, case: Case) -> None:
        """One composition: run it, count it, and shrink the guarantee's first failure."""
        result = self.certificate.guarantees[case.guarantee]
        begin = time.monotonic()
        self._tell(f"{case.guarantee}: {result.compositions}, {result.mismatches} differ")
        ran = self.bench.run(case)
        result.seconds += time.monotonic() - begin
        pairs = enumerate(zip(case.requests, ran.seen, strict=True))
        occurred = [i for i, pair in pairs if self.bench.occurred(result.name, *pair)]
        self.tally.count(result, ran, occurred)
        if ran.mismatches and result.first is None:
            self._first_failure(result, ran)

    def _first_failure(self, result: Result, ran: Ran) -> None:
        """Is it the same when it is run again, how small can it be, and where does it arise?"""
        case, smallest = ran.case, ran.mismatches[0]
        place, tried = smallest.request, 0
        end = time.monotonic() + max(_SHRINK * self.seconds, 5.0)

        def fails(case: Case, place: int) -> bool:
            nonlocal smallest
            self._tell(f"{case.guarantee}: shrinking, {len(case.requests)} requests")
            found = [m for m in self.bench.run(case).mismatches if m.request == place]
            smallest = found[0] if found else smallest
            return bool(found)

        repeats = self.bench.run(case).mismatches == ran.mismatches
        if repeats:
            case, place, tried = shrink(case, place, fails, lambda: time.monotonic() < end)
        mates = [str(len(s.prompt)) for i, s in enumerate(case.requests) if i != place]
        beside = f"prompts of {', '.join(mates)}" if mates else "no other one"
        sent = case.requests[place]
        tokens = f"{len(sent.prompt)} token{'s' * (len(sent.prompt) > 1)}"
        said = f"a prompt of {tokens} beside {beside}: {smallest.what}"
        if not repeats:
            said += "; run again, the same composition gave something else: it is not repeatable"
        result.first = {
            "said": said,
            "found_at": ran.case.index,
            "requests": len(ran.case.requests),
            "tried": tried,
            "repeats": repeats,
            "request": place,
            "token": smallest.token,
            "ulps": smallest.ulps,
            "case": case.to_json(),
        }
        if case.front == "engine" and self.certificate.layers is None:
            if found := layers_of(self.bench, case, place):
                self.certificate.layers = {"guarantee": result.name, **found.to_json()}

    def _schedules(self) -> None:
        end = time.monotonic() + _SCHEDULES * self.seconds
        self._tell("schedules")
        # One that was never compared has all the time there is.
        found = self_test(
            self.model, lambda new: time.monotonic() < end or (new and self._left() > 0)
        )
        if not found:
            name = self.model.ops.implementation
            reason = f"{name} has one schedule an op on {jax.default_backend()}"
            self.certificate.schedules = {"verdict": PASS, "reason": reason}
            return
        short = any(op.compared < op.schedules for op in found)
        verdict = FAIL if any(op.differ for op in found) else NOT_TESTED if short else PASS
        ops = [dataclasses.asdict(op) for op in found]
        self.certificate.schedules = {"verdict": verdict, "ops": ops}

    def _second_process(self, child: SecondProcess) -> None:
        result, begin = self.certificate.guarantees["G9"], time.monotonic()
        self._tell("G9: the second process")
        # It had all the time there was; a little more, if that was short.
        found = child.results(max(self._left(), 0.1 * self.seconds))
        result.seconds = time.monotonic() - begin
        if isinstance(found, str):
            result.reason = found
            return
        result.trials = result.compositions = 1
        for sent, got in zip(child.requests, found, strict=True):
            c = self.bench.alone(sent.prompt, sent.sampling)
            result.comparisons += 1
            result.occurred += 1
            result.lengths = wider(result.lengths, len(sent.prompt))
            if got != bits_of(c.token_ids, c.logprobs):
                result.mismatches += 1
                said = f"a prompt of {len(sent.prompt)} tokens has other bits in a second process"
                result.first = result.first or {"said": said, "case": None}

    def _other_card(self, other: Mapping[str, Any]) -> None:
        """G11: the hash of another card's runs alone."""
        result = self.certificate.guarantees["G11"]
        own = self.certificate.to_json()
        for what in ("subject", "settings"):
            keys = ("seed",) if what == "settings" else own["subject"]
            if differ := [k for k in keys if own[what][k] != other[what].get(k)]:
                result.reason = f"the other report has another {', '.join(differ)}"
                return
        mine, others = own["environment"], other["environment"]
        if mine["versions"] != others["versions"] or mine["device"] == others["device"]:
            result.reason = "the other report has other versions, or is of the same device"
            return
        result.trials = result.compositions = 1
        result.comparisons = result.occurred = len(self.pool.all)
        if self.certificate.sha256 != other["sha256"]:
            result.mismatches = 1
            said = f"{others['device']['kind']} has sha256 {other['sha256']}"
            result.first = {"said": said, "case": None}


@contextlib.contextmanager
def _compiling() -> Iterator[ThreadPoolExecutor]:
    """Threads, of which none begins another compile once the block is left."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        try:
            yield threads
        finally:
            threads.shutdown(cancel_futures=True)


def _short(error: BaseException) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return f"the device ran out of memory: {text}" if "RESOURCE_EXHAUSTED" in text else text
