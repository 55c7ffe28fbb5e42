"""The scheduler against a pretended device, which remembers what each page holds.

The device checks that a step reads, through the page table, the very tokens of its request,
and chooses as next token a hash of them all. So a wrong page, position or order shows as a
wrong token, in a run of hundreds of steps, without a model.
"""

import random
import zlib

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jdet.engine.config import EngineConfig
from jdet.engine.request import Request
from jdet.engine.scheduler import Plan, Scheduler
from jdet.sampling import SamplingParams

PAGE, VOCABULARY = 16, 5


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Device:
    """Pages of tokens, and the last token of each slot."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.num_pages is not None
        self.config = config
        self.pages = [[-1] * PAGE for _ in range(config.num_pages)]
        self.last: dict[int, int] = {}

    def run(self, plan: Plan) -> list[int]:
        """What each row of the step chooses. All rows write before any of them reads."""
        assert len(plan.chunks) <= plan.chunk_shape[0]
        assert plan.chunk_shape in (*self.config.chunk_shapes, (0, 0))
        assert plan.chunk_shape[0] * plan.chunk_shape[1] + len(plan.decodes) <= (
            self.config.max_tokens_per_step
        )
        assert len(plan.decodes) <= plan.decode_rows <= self.config.max_batch_size
        for chunk in (*plan.chunks, *plan.decodes):
            r = chunk.request
            assert r.slot is not None and 1 <= chunk.length
            ids = r.tokens(chunk.start, chunk.start + chunk.length)
            if chunk in plan.decodes:
                ids = [self.last[r.slot]]
            else:
                assert chunk.length <= plan.chunk_shape[1]
            for position, token in enumerate(ids, chunk.start):
                self.pages[r.pages[position // PAGE]][position % PAGE] = token
        chosen = []
        for chunk in (*plan.chunks, *plan.decodes):
            r = chunk.request
            read = [t for page in r.pages for t in self.pages[page]][: chunk.start + chunk.length]
            assert read[: r.known] == r.tokens(0, min(r.known, len(read)))
            chosen.append(next_token(read))
            if chunk.emits:
                assert r.slot is not None
                self.last[r.slot] = chosen[-1]
        return chosen


class Run:
    """The engine's loop: a step is sent before the one before it has been seen."""

    def __init__(self, config: EngineConfig) -> None:
        self.scheduler = Scheduler(config)
        self.device = Device(config)
        self.sent: list[tuple[Plan, list[int]]] = []

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.sent.append((plan, self.device.run(plan)))
        if self.sent and (plan is None or len(self.sent) > 1):
            self.see(*self.sent.pop(0))
        return bool(self.sent or self.scheduler.waiting or self.scheduler.running)

    def see(self, plan: Plan, chosen: list[int]) -> None:
        for chunk, token in zip((*plan.chunks, *plan.decodes), chosen, strict=True):
            r = chunk.request
            if r.finish_reason is not None:
                continue
            if chunk.emits:
                r.pending -= 1
                r.token_ids.append(token)
            self.scheduler.seen(r)
            if chunk.emits and (
                token in r.stop_token_ids or len(r.token_ids) == r.params.max_tokens
            ):
                self.scheduler.finish(r, "stop" if token in r.stop_token_ids else "length")


def config_of(num_pages: int, *, batch: int = 4, budget: int = 40, caching: bool = True):
    config = EngineConfig(
        max_batch_size=batch,
        max_tokens_per_step=budget,
        page_size=PAGE,
        num_pages=num_pages,
        max_model_len=PAGE * num_pages,
        prefix_caching=caching,
        chunk_sizes=(4, 16, 32),
    )
    return config.resolved(context_length=4096, kv_split=256)


requests = st.lists(
    st.tuples(
        st.integers(0, 40),  # the step of its arrival
        st.integers(1, 60),  # tokens of its prompt
        st.integers(1, 30),  # max_tokens
        st.integers(0, 2),  # what it begins with
        st.booleans(),  # ends at token 0
        st.sampled_from([None, None, None, 3, 25]),  # cancelled so many steps after arrival
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150)
@given(requests=requests, num_pages=st.integers(6, 16), caching=st.booleans())
def test_every_request_gets_its_own_tokens_and_all_pages_come_back(
    requests: list[tuple], num_pages: int, caching: bool
) -> None:
    run = Run(config_of(num_pages, caching=caching))
    arrivals = []
    for i, (at, length, tokens, family, stops, cancelled) in enumerate(requests):
        rng = random.Random(family)
        prompt = [rng.randrange(VOCABULARY) for _ in range(length)]
        request = Request(
            arrival=i,
            prompt=prompt,
            params=SamplingParams(temperature=0, max_tokens=tokens),
            stop_token_ids=frozenset({0} if stops else ()),
        )
        arrivals.append((at, cancelled, request))
    for step in range(3000):
        for at, cancelled, request in arrivals:
            if step == at:
                run.scheduler.add(request)
            if cancelled is not None and step == at + cancelled and not request.finish_reason:
                run.scheduler.finish(request, "cancelled")
        if not run.step() and step > 70:
            break
    else:
        raise AssertionError("the engine does not come to an end")
    for _, _, request in arrivals:
        wanted = alone(list(request.prompt), request.params.max_tokens)
        if 0 in request.stop_token_ids and 0 in wanted:
            wanted = wanted[: wanted.index(0) + 1]
        if request.finish_reason == "cancelled":
            wanted = wanted[: len(request.token_ids)]
        assert request.token_ids == wanted
    assert run.scheduler.pool.available == num_pages


def finish_all(run: Run, *added: Request) -> None:
    for request in added:
        run.scheduler.add(request)
    while run.step():
        pass


def request_of(arrival: int, length: int, max_tokens: int, **params) -> Request:
    prompt = [random.Random(7).randrange(VOCABULARY) for _ in range(length)]
    return Request(arrival, prompt, SamplingParams(temperature=0, max_tokens=max_tokens, **params))


def test_the_youngest_gives_way_and_is_read_again() -> None:
    run = Run(config_of(6, caching=False))
    requests = [request_of(i, 20, 40) for i in range(3)]
    finish_all(run, *requests)
    assert run.scheduler.counts.preemptions >= 1
    assert all(r.token_ids == alone(list(r.prompt), 40) for r in requests)


def test_a_prompt_that_begins_alike_is_not_read_again_but_for_its_last_token() -> None:
    run = Run(config_of(16))
    finish_all(run, request_of(0, 64, 5))
    assert run.scheduler.counts.reused_tokens == 0
    finish_all(run, request_of(1, 64, 5))
    assert run.scheduler.counts.reused_tokens == 48  # the fourth page holds the last token
    finish_all(run, request_of(2, 65, 5))
    assert run.scheduler.counts.reused_tokens == 48 + 64


def test_a_request_for_prompt_logprobs_reads_its_whole_prompt() -> None:
    run = Run(config_of(16))
    finish_all(run, request_of(0, 64, 5), request_of(1, 64, 5, prompt_logprobs=0))
    finish_all(run, request_of(2, 64, 5, prompt_logprobs=0))
    assert run.scheduler.counts.reused_tokens == 0


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation() -> None:
    run = Run(config_of(16))
    first = request_of(0, 30, 20)
    finish_all(run, first)
    turn = Request(1, [*first.prompt, *first.token_ids, 1], first.params)
    finish_all(run, turn)
    assert run.scheduler.counts.reused_tokens == 48


def test_a_long_prompt_is_cut_and_others_generate_meanwhile() -> None:
    run = Run(config_of(16))
    short, long = request_of(0, 3, 20), request_of(1, 200, 3)
    run.scheduler.add(short)
    run.step()
    finish_all(run, long)
    assert run.scheduler.counts.unfinished_chunks >= 5
    assert run.scheduler.counts.mixed_steps >= 5


@pytest.mark.parametrize("batch", [1, 4, 5, 32])
def test_shapes_are_few_and_fit_the_budget(batch: int) -> None:
    config = EngineConfig(max_batch_size=batch).resolved(context_length=2048, kv_split=256)
    assert config.decode_sizes[-1] == batch
    assert len(config.chunk_shapes) <= 9
    assert all(rows * size <= config.max_tokens_per_step for rows, size in config.chunk_shapes)
    assert config.num_pages == max(batch * 16, 32)


def test_numbers_of_rows_that_are_given_are_those_compiled() -> None:
    config = EngineConfig(
        max_batch_size=32, chunk_sizes=(16, 64), chunk_rows=(1, 32), decode_rows=(32,)
    )
    assert config.decode_sizes == (32,)
    assert config.chunk_shapes == ((1, 16), (32, 16), (1, 64), (8, 64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0; allowed: integers from 1"),
        ({"page_size": 24}, "page_size=24; allowed: multiples of 16"),
        ({"page_size": 48}, "page_size=48; allowed: divisors of the contract's kv_split=256"),
        ({"max_tokens_per_step": 32}, "max_tokens_per_step=32; allowed: from 33"),
        ({"max_model_len": 4096}, "max_model_len=4096; allowed: up to 2048"),
        ({"chunk_sizes": (64, 16)}, "ascending integers from 1"),
        ({"chunk_sizes": (500,)}, "the first must be at most 480"),
        ({"chunk_sizes": (16, 1024)}, "up to max_tokens_per_step=512"),
        ({"chunk_rows": (4, 8)}, "chunk_rows=(4, 8); the first must be 1"),
        ({"decode_rows": (1, 8)}, "decode_rows=(1, 8); the last must be max_batch_size=32"),
        ({"decode_rows": ()}, "decode_rows=(); allowed: ascending integers from 1"),
        ({"chunk_sizes": 64}, "chunk_sizes=64; allowed: ascending integers from 1"),
        ({"prefix_caching": "no"}, "prefix_caching='no'; allowed: True, False"),
        ({"num_pages": True}, "num_pages=True; allowed: integers from 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        EngineConfig(**values).resolved(context_length=2048, kv_split=256)
