"""The engine: requests come and go, and none of them can be seen in another's bits."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from tqdm import tqdm

from jdet.compiler import check_environment
from jdet.completion import (
    Completion,
    LanguageModel,
    encode_prompt,
    requests_of,
    stop_string_end,
)
from jdet.engine.config import EngineConfig
from jdet.engine.device import Device, Results
from jdet.engine.handle import Delta, DeltaReader, Handle, text_of
from jdet.engine.request import Request
from jdet.engine.scheduler import Chunk, Counts, Plan, Scheduler
from jdet.engine.step import PromptLogprobs, TopTokens
from jdet.engine.stops import StopStrings
from jdet.sampling import SamplingParams, bias_pairs, stop_tokens


class Engine:
    """Continuous batching over a paged cache, with the bits of each request run alone.

    Not for several threads; `jdet.engine.aio.AsyncEngine` is its face for asyncio.

    Args:
      model: as from `jdet.load`.
      config: sizes; default: `EngineConfig()`.
      cache_fill: the value of unused cache slots; tests poison them with NaN.
      watch: called with every step's plan as it is sent, to see what was composed.

    Raises:
      ValueError: sizes that do not fit the model.
      EnvironmentRefused: XLA_FLAGS holds a flag against the promise.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig | None = None,
        *,
        cache_fill: float = 0.0,
        watch: Callable[[Plan], object] = lambda plan: None,
    ) -> None:
        if model.ops.implementation != "xla":
            check_environment()
        self.model = model
        self.config = (config or EngineConfig()).resolved(
            context_length=model.decoder.config.max_position_embeddings,
            kv_split=model.ops.contract.kv_split,
        )
        self._eos = () if model.tokenizer is None else model.tokenizer.eos_token_ids
        self._device = Device(model.decoder, model.ops, self.config, self._eos, cache_fill)
        self._scheduler = Scheduler(self.config)
        self._watch = watch
        self._sent: collections.deque[tuple[Plan, Results]] = collections.deque()
        self._stops: dict[Request, StopStrings] = {}
        self._arrivals = 0

    @property
    def counts(self) -> Counts:
        """What has happened so far."""
        return self._scheduler.counts

    @property
    def compiles(self) -> int:
        """Programs compiled so far, by all engines with this model's ops."""
        return self._device.compiles

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sent or self._scheduler.waiting or self._scheduler.running)

    def warm_up(self, sampling: Sequence[SamplingParams] | None = None) -> None:
        """Compile now what requests with these parameters need, in any mix; None: everything.

        Without it each program is compiled when it is first needed.
        """
        self._device.warm_up(sampling)

    def compile_jobs(
        self, sampling: Sequence[SamplingParams] | None = None
    ) -> list[Callable[[], None]]:
        """What `warm_up` compiles, a function for each program, to be called in threads.

        XLA compiles a program on one core, and without Python's lock: called side by side they
        take the time of a few. They run nothing on the device.
        """
        return self._device.compile_jobs(sampling)

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        prompt_index: int = 0,
    ) -> Handle:
        """Let a prompt, as text or token ids, wait for its turn.

        Raises:
          ValueError: a request that does not fit the model or can never fit the engine.
        """
        params = (sampling or SamplingParams()).with_seed()
        name = f"request-{self._arrivals}" if request_id is None else request_id
        ids = encode_prompt(self.model, prompt, params, name)
        self._check_fits(ids, params, name)
        requests = tuple(
            Request(
                arrival=self._arrivals + i,
                prompt=ids,
                params=params,
                sample_index=i,
                stop_token_ids=frozenset(stop_tokens(params, self._eos)),
            )
            for i in range(params.n)
        )
        self._arrivals += params.n
        for request in requests:
            if params.stop:
                self._stops[request] = StopStrings(self.model.tokenizer, params)
            self._scheduler.add(request)
        return Handle(name, prompt_index, requests)

    def cancel(self, handle: Handle) -> None:
        """End what has not ended; its completions hold the tokens seen so far."""
        for request in handle.requests:
            if request.finish_reason is None:
                self._finish(request, "cancelled")

    def step(self) -> bool:
        """Send one step and look at the results of the one before it.

        While the device computes a step the host prepares the next one. So a request that
        ends by a token is computed for one token more, which is dropped.

        Returns:
          Whether there is more to do.
        """
        plan = self._scheduler.schedule()
        if plan is not None:
            self._watch(plan)
            self._sent.append((plan, self._device.run(plan)))
        if self._sent and (plan is None or len(self._sent) > 1):
            self._see(*self._sent.popleft())
        return self.busy

    def stream(self, handle: Handle) -> Iterator[Delta]:
        """Run the engine until the handle is done, and give its tokens as they come.

        All other requests go on meanwhile. Joined, the deltas are the completions.
        """
        reader = DeltaReader(self.model, handle)
        while not reader.done:
            if not handle.done:
                self.step()
            yield from reader.read()

    def completions(self, handle: Handle) -> list[Completion]:
        """The results of a handle that is done, by sample.

        Raises:
          ValueError: it is not done.
        """
        if not handle.done:
            raise ValueError(f"{handle.request_id} is not done")
        return [self._completion(handle, request) for request in handle.requests]

    def cached(self, handle: Handle) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values of a handle's first sample, by layer: [Hkv, tokens, D].

        Those of all positions that the steps sent so far compute; this waits for the device.

        Raises:
          ValueError: it is not running, so that the cache need not hold them.
        """
        if handle.requests[0].slot is None:
            raise ValueError(f"{handle.request_id} is not running; its pages are given back")
        return self._device.cached(handle.requests[0])

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Complete prompts; `prompt_index`, then `sample_index` ascending: input order.

        Args:
          sampling: one for all, or one a prompt.
          progress: a bar on stderr; None: where that is a terminal.

        Raises:
          ValueError: as `submit`, before any of the prompts has begun.
        """
        handles = []
        try:
            for i, (prompt, params) in enumerate(requests_of(prompts, sampling or _DEFAULT)):
                handles.append(self.submit(prompt, params, f"prompt {i}", prompt_index=i))
        except ValueError:
            for handle in handles:
                self.cancel(handle)
            raise
        self._run(handles, progress)
        return [c for handle in handles for c in self.completions(handle)]

    def _run(self, handles: list[Handle], progress: bool | None) -> None:
        requests = [r for handle in handles for r in handle.requests]
        before, start = dataclasses.replace(self.counts), time.perf_counter()
        disable = None if progress is None else not progress
        with tqdm(total=len(requests), unit="completion", disable=disable) as bar:
            while not all(handle.done for handle in handles):
                self.step()
                if not bar.disable:
                    seconds = time.perf_counter() - start
                    read = self.counts.prompt_tokens - before.prompt_tokens
                    made = self.counts.decode_tokens - before.decode_tokens
                    bar.set_postfix_str(
                        f"prefill {read / seconds:.0f} tok/s, decode {made / seconds:.0f} tok/s"
                    )
                    bar.update(sum(r.finish_reason is not None for r in requests) - bar.n)

    def _check_fits(self, ids: list[int], params: SamplingParams, name: str) -> None:
        c, total = self.config, len(ids) + params.max_tokens
        assert c.max_model_len is not None and c.num_pages is not None
        most = min(c.max_model_len, c.num_pages * c.page_size)
        if total > most:
            raise ValueError(
                f"{name} has {len(ids)} tokens, and max_tokens={params.max_tokens}; together at "
                f"most {most} (max_model_len={c.max_model_len}, num_pages={c.num_pages})"
            )
        for field, count, limit in (
            ("logit_bias", len(bias_pairs(params.logit_bias)), c.max_logit_bias),
            ("stop_token_ids", len(stop_tokens(params, self._eos)), c.max_stop_token_ids),
        ):
            if count > limit:
                raise ValueError(f"{name} has {count} {field}; allowed: up to {limit}")

    def _see(self, plan: Plan, results: Results) -> None:
        """Take over the results of a step; this waits for the device."""
        for row, chunk in enumerate(plan.chunks):
            request = chunk.request
            if request.finish_reason is None and request.unread_prompt_logprobs:
                assert results.prompt_logprobs is not None
                _see_prompt(chunk, row, results.prompt_logprobs)
            if not chunk.emits:
                self._scheduler.seen(request)
        if results.chosen is None:
            return
        chosen = jax.device_get(results.chosen)
        token, logprob = chosen.token.tolist(), chosen.logprob.tolist()
        for i, (_, chunk) in enumerate(plan.emits):
            request, count = chunk.request, chunk.request.params.logprobs
            if request.finish_reason is not None:
                continue
            request.pending -= 1
            request.token_ids.append(token[i])
            request.logprobs.append(logprob[i])
            if count is not None:
                request.top_logprobs.append(_best(chosen.top, i, count))
            self._scheduler.seen(request)
            self._end(request)

    def _end(self, request: Request) -> None:
        token, params = request.token_ids[-1], request.params
        stops = self._stops.get(request)
        reason = None
        if token in request.stop_token_ids:
            reason = "stop"
        elif len(request.token_ids) == params.max_tokens:
            reason = "length"
        if stops is not None and (stops.push(token) or reason):
            end = stop_string_end(self.model.tokenizer, request.token_ids, params)
            if end is not None:
                del request.token_ids[end:], request.logprobs[end:], request.top_logprobs[end:]
                request.stop_string, reason = True, "stop"
        if reason is not None:
            self._finish(request, reason)

    def _finish(self, request: Request, reason: str) -> None:
        self._stops.pop(request, None)
        self._scheduler.finish(request, reason)

    def _completion(self, handle: Handle, request: Request) -> Completion:
        params = request.params
        wants_prompt = params.prompt_logprobs is not None
        return Completion(
            prompt_index=handle.prompt_index,
            sample_index=request.sample_index,
            prompt_token_ids=list(request.prompt),
            token_ids=request.token_ids,
            text=text_of(self.model.tokenizer, request),
            logprobs=request.logprobs,
            finish_reason=str(request.finish_reason),
            seed=params.seed,
            fingerprint=self.model.ops.fingerprint,
            top_logprobs=request.top_logprobs if params.logprobs is not None else None,
            prompt_logprobs=request.prompt_logprobs if wants_prompt else None,
            prompt_top_logprobs=request.prompt_top_logprobs if wants_prompt else None,
        )


_DEFAULT = SamplingParams()


def _see_prompt(chunk: Chunk, row: int, found: PromptLogprobs) -> None:
    """Take over the log-probs of the prompt's tokens behind each position of the chunk."""
    request, count = chunk.request, chunk.request.params.prompt_logprobs
    assert count is not None
    first = len(request.prompt_logprobs) - chunk.start
    end = min(chunk.length, len(request.prompt) - 1 - chunk.start)
    request.prompt_logprobs += np.asarray(found.logprob)[row, first:end].tolist()
    top = jax.tree.map(lambda x: np.asarray(x)[row], found.top)
    request.prompt_top_logprobs += [_best(top, at, count) for at in range(first, end)]


def _best(top: TopTokens | None, row: int, count: int) -> dict[int, float]:
    if top is None or not count:
        return {}
    ids, logprobs = np.asarray(top.token_ids[row]), np.asarray(top.logprobs[row])
    return dict(zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True))
