"""Cases run on the real engine: what came out, what was composed, and where it differs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jdet.certify.batches import Batch, of_call, of_steps
from jdet.certify.cases import CALL_ROWS, TOKENS, Case, Needle, Sent, engine_config
from jdet.completion import Completion, LanguageModel
from jdet.engine.engine import Engine
from jdet.engine.handle import Handle
from jdet.engine.request import Request
from jdet.engine.scheduler import Plan
from jdet.generation import generate
from jdet.sampling import SamplingParams
from jdet.scoring import score
from jdet.testing.bits import first_difference

type Cached = list[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the engine did with one request.

    Attributes:
      rows: requests in one step with it, at most, itself included.
      places: its row in each of these steps, chunks before generating rows.
      starts: where each chunk of its prompt began.
      reused: tokens of its prompt that were in the prefix cache.
      preempted: how often its pages were taken.
      shapes: (rows, length) of chunks and generating rows that its steps were padded to.
      lengths: of the prompts beside it.
      kinds: how many different sampling parameters stood beside it.
      tokens: computed in one of these steps, at most.
    """

    rows: int
    places: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    reused: int = 0
    preempted: int = 0
    shapes: frozenset[tuple[int, int, int]] = frozenset()
    lengths: frozenset[int] = frozenset()
    kinds: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A request whose bits are not those of its run alone.

    Attributes:
      request: its place in the case.
      token: the first token of the completion that is another or has another log-prob; of a
        prompt's own log-probs, counted from its end: -1 is the last.
      what: in words, with both values in hexadecimal and the distance in ULPs.
      ulps: that distance; None where the tokens differ.
    """

    request: int
    token: int
    what: str
    ulps: int | None = None


@dataclasses.dataclass(frozen=True)
class Ran:
    """A case that ran: for each request what was seen, all mismatches, and all batches."""

    case: Case
    seen: tuple[Seen, ...]
    mismatches: tuple[Mismatch, ...]
    batches: tuple[Batch, ...]


class Bench:
    """One model, one set of engine shapes, and the runs alone that all is compared with."""

    def __init__(self, model: LanguageModel, batch: int) -> None:
        self.model, self.batch = model, batch
        self._alone: dict[tuple[tuple[int, ...], SamplingParams], tuple[Completion, Seen]] = {}

    def alone(self, prompt: Sequence[int], sampling: SamplingParams) -> Completion:
        """The completion of a request that runs by itself, computed once."""
        return self._solo(tuple(prompt), sampling)[0]

    def _solo(self, prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[Completion, Seen]:
        key = prompt, sampling
        if key not in self._alone:
            [completion], [seen] = self._engine(Case("", 0, (Sent(*key),)))[:2]
            if not np.isfinite(completion.logprobs).all():
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens, alone, has log-probs that are not finite: "
                    "equal bits of such ones prove nothing"
                )
            self._alone[key] = completion, seen
        return self._alone[key]

    def run(self, case: Case) -> Ran:
        """Run a case and compare every request with its run alone."""
        if case.front == "score":
            return self._score(case)
        if case.front == "generate":
            prompts = [list(s.prompt) for s in case.requests]
            params, rows = [s.sampling for s in case.requests], len(prompts)
            completions = generate(self.model, prompts, params, batch_size=rows)
            # In an engine of its own: other pages and shapes than the runs alone had.
            seen = [Seen(rows, shapes=frozenset({(0, 0, 0)}))] * rows
            batches = of_call(case)
        else:
            completions, seen, batches, _ = self._engine(case)
        pairs = enumerate(zip(case.requests, completions, strict=True))
        found = (self._compare(i, *pair) for i, pair in pairs)
        return Ran(case, tuple(seen), tuple(m for m in found if m is not None), tuple(batches))

    def compile_jobs(self, needles: Sequence[Needle]) -> list[Callable[[], object]]:
        """What compiles all programs that cases of these requests need, for threads."""
        greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        # G6 reads generated tokens as a prompt.
        params = [dataclasses.replace(greedy, prompt_logprobs=0), *(n[1] for n in needles)]
        engine = Engine(self.model, engine_config(self.batch, prefix_caching=False))
        prompts = [[0] * 16] * CALL_ROWS
        return [
            *engine.compile_jobs(params),
            lambda: generate(self.model, prompts, greedy, batch_size=CALL_ROWS),
            lambda: score(self.model, [p + [0] for p in prompts], batch_size=CALL_ROWS),
        ]

    def compile(self, case: Case) -> None:
        """Run a case for the programs it needs; what comes out is not compared."""
        self._engine(case)

    def cached(self, case: Case, request: int) -> tuple[Cached, list[int]] | None:
        """The request's keys and values, by layer, as its last step leaves them; its tokens.

        None where it was cancelled before, or had given its pages back.
        """
        completions, *_, found = self._engine(case, snapshot=request)
        return None if found is None else (found, completions[request].token_ids)

    def occurred(self, guarantee: str, sent: Sent, seen: Seen) -> bool:
        """Whether the engine formed, around this request, what the guarantee is about."""
        if guarantee == "G6":
            return sent.read > 0 or not seen.shapes
        if guarantee == "G5":
            return seen.reused > 0
        if guarantee == "G7":
            return seen.preempted > 0
        if guarantee == "G10":
            c: Any = self.model.decoder.config
            # More choices than experts: tokens of a step share some.
            return seen.rows > 1 and seen.tokens * c.num_experts_per_tok > c.num_experts
        if guarantee == "G1":
            return seen.rows > 1
        if guarantee == "G2":
            return seen.rows > 1 and any(seen.places) and bool(seen.lengths) and seen.kinds > 0
        alone = self._solo(sent.prompt, sent.sampling)[1]
        if guarantee == "G3":
            return bool(seen.shapes - alone.shapes)
        return guarantee == "G4" and seen.starts != alone.starts and seen.preempted == 0

    def _engine(
        self, case: Case, snapshot: int | None = None
    ) -> tuple[list[Completion], list[Seen], list[Batch], Cached | None]:
        plans: list[Plan] = []
        config = engine_config(self.batch, prefix_caching=case.prefix_caching)
        engine = Engine(self.model, config, cache_fill=float("nan"), watch=plans.append)
        waiting = list(enumerate(case.requests))
        handles: dict[int, Handle] = {}
        cached: Cached | None = None
        step = 0
        while waiting or engine.busy:
            if not engine.busy:
                step = max(step, waiting[0][1].arrive)
            while waiting and waiting[0][1].arrive <= step:
                index, sent = waiting.pop(0)
                handles[index] = engine.submit(list(sent.prompt), sent.sampling)
            for index, handle in handles.items():
                if case.requests[index].cancel == step and not handle.done:
                    engine.cancel(handle)
            engine.step()
            step += 1
            if snapshot in handles and cached is None:
                [request] = handles[snapshot].requests
                if request.slot is not None and request.chosen == request.params.max_tokens:
                    cached = engine.cached(handles[snapshot])
        order = [handles[i].requests[0] for i in range(len(case.requests))]
        completions = [engine.completions(handles[i])[0] for i in range(len(case.requests))]
        places = {request: i for i, request in enumerate(order)}
        seen = [_seen(plans, request) for request in order]
        return completions, seen, of_steps(plans, places), cached

    def _score(self, case: Case) -> Ran:
        solos = [self.alone(s.prompt, s.sampling) for s in case.requests]
        given = [list(s.prompt) + c.token_ids for s, c in zip(case.requests, solos, strict=True)]
        scores = score(self.model, given, batch_size=len(given))
        mismatches = []
        for i, (solo, got) in enumerate(zip(solos, scores, strict=True)):
            count = len(solo.logprobs)
            found = _difference(i, solo.logprobs, got[-count:], "score")
            mismatches += [found] if found else []
        seen = (Seen(len(given)),) * len(given)
        return Ran(case, seen, tuple(mismatches), tuple(of_call(case)))

    def _compare(self, index: int, sent: Sent, got: Completion) -> Mismatch | None:
        if sent.read:
            params = dataclasses.replace(sent.sampling, max_tokens=TOKENS, prompt_logprobs=None)
            wanted = self.alone(sent.prompt[: -sent.read], params)
            assert got.prompt_logprobs is not None
            own, given = wanted.logprobs[: sent.read], got.prompt_logprobs[-sent.read :]
            if found := _difference(index, own, given, "the prompt's"):
                return dataclasses.replace(found, token=found.token - sent.read)
        else:
            wanted = self.alone(sent.prompt, sent.sampling)
        # One that was cancelled is compared as far as it came.
        count = len(got.token_ids) if sent.cancel is not None else None
        end = None if count is None else sent.read + count
        ids, logprobs = wanted.token_ids[sent.read : end], wanted.logprobs[sent.read : end]
        return _difference(index, logprobs, got.logprobs, "log-prob") or (
            None if ids == got.token_ids else _other_token(index, ids, got.token_ids)
        )


def _other_token(index: int, wanted: Sequence[int], got: Sequence[int]) -> Mismatch:
    pairs = list(zip(wanted, got, strict=False))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return Mismatch(index, at, f"token {at}: {wanted[at : at + 1]} alone, {got[at : at + 1]} here")


def _difference(
    index: int, wanted: Sequence[float], got: Sequence[float], name: str
) -> Mismatch | None:
    a, b = np.array(wanted, np.float32), np.array(got, np.float32)
    if a.shape != b.shape:
        return Mismatch(index, min(len(a), len(b)), f"{len(b)} tokens, {len(a)} alone")
    found = first_difference(a, b)
    if found is None:
        return None
    [at] = found.index
    (alone, here), (alone_bits, here_bits) = found.values, found.bits
    what = (
        f"{name} of token {at} is {alone_bits} ({alone}) alone and {here_bits} ({here}) here, "
        f"{found.ulps} ULP; {found.count} of {found.size} differ, by up to {found.max_ulps} ULP"
    )
    return Mismatch(index, at, what, found.max_ulps)


def _seen(plans: Sequence[Plan], request: Request) -> Seen:
    """Read off the steps that computed the request."""
    rows, tokens, end, preempted, reused = 1, 1, 0, 0, 0
    places, starts, shapes = [], [], set()
    mates: set[Request] = set()
    for plan in plans:
        chunks = (*plan.chunks, *plan.decodes)
        place = next((i for i, c in enumerate(chunks) if c.request is request), None)
        if place is None:
            continue
        own = chunks[place]
        if not places:
            reused = own.start
        elif own.start < end:
            preempted += 1
        end = own.start + own.length
        if own.start < len(request.prompt):
            starts.append(own.start)
        places.append(place)
        rows = max(rows, len(chunks))
        tokens = max(tokens, sum(c.length for c in chunks))
        shapes.add((*plan.chunk_shape, plan.decode_rows))
        mates |= {c.request for c in chunks if c.request is not request}
    return Seen(
        rows=rows,
        places=tuple(places),
        starts=tuple(starts),
        reused=reused,
        preempted=preempted,
        shapes=frozenset(shapes),
        lengths=frozenset(len(m.prompt) for m in mates) - {len(request.prompt)},
        kinds=len({m.params for m in mates} - {request.params}),
        tokens=tokens,
    )
