"""Compositions to try: who is sent when, made at random for each guarantee from one seed."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from jdet.engine.config import EngineConfig
from jdet.sampling import SamplingParams
from jdet.testing.compositions import compose

# Tokens a request generates: enough to go on while the prompts of a full batch are read.
TOKENS = 8
CHUNKS = (16, 64)
SHORT = (1, 2, 7, 8, 9, 15, 16)
MIDDLE = (17, 33, 63, 64, 65, 120)
# Around the end of a split of attention's keys, and of a few pages.
LONG = (255, 256, 257, 300)
# Prompt and completion together, at most.
LONGEST = 320
_PAGE = 16
# Requests of the calls that make an engine of their own, or none: of one size, for few compiles.
CALL_ROWS = 4
# The arrival of those that wait until nothing runs.
LATER = 10_000


@dataclasses.dataclass(frozen=True)
class Sent:
    """One request of a case.

    Attributes:
      prompt, sampling: as `Engine.submit` takes them.
      arrive: the step at which it is sent, after those before it; where nothing runs, the next
        one comes at once.
      cancel: the step at which it is cancelled.
      read: so many of the prompt's last tokens were generated in a run alone: they, and what
        comes behind them, must be what that run gave.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrive: int = 0
    cancel: int | None = None
    read: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; sampling parameters that have their defaults are left out."""
        default = SamplingParams()
        own = {
            field.name: value
            for field in dataclasses.fields(SamplingParams)
            if (value := getattr(self.sampling, field.name)) != getattr(default, field.name)
        }
        rest = {"arrive": self.arrive, "cancel": self.cancel, "read": self.read}
        return {"prompt": list(self.prompt), "sampling": own, **rest}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Sent":
        """What `to_json` wrote."""
        given = {"prompt": tuple(data["prompt"]), "sampling": SamplingParams(**data["sampling"])}
        return cls(**{**data, **given})


@dataclasses.dataclass(frozen=True)
class Case:
    """One composition.

    Attributes:
      guarantee: "G1".."G11", the one that it is made for.
      index: its number there.
      requests: in the order they are sent.
      front: "engine", or the whole call that runs it: "generate" or "score".
      prefix_caching: of the engine.
    """

    guarantee: str
    index: int
    requests: tuple[Sent, ...]
    front: str = "engine"
    prefix_caching: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "requests": [r.to_json() for r in self.requests]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Case":
        """What `to_json` wrote."""
        return cls(**{**data, "requests": tuple(Sent.from_json(r) for r in data["requests"])})


type Needle = tuple[tuple[int, ...], SamplingParams]


@dataclasses.dataclass(frozen=True)
class Pool:
    """The requests that are compared: prompts of `SHORT`, `MIDDLE` and `LONG` lengths.

    Each short length is there at temperature 0 and with noise, the others one way.
    """

    short: tuple[Needle, ...]
    middle: tuple[Needle, ...]
    long: tuple[Needle, ...]

    @property
    def all(self) -> tuple[Needle, ...]:
        """All of them."""
        return self.short + self.middle + self.long

    @property
    def greedy(self) -> tuple[Needle, ...]:
        """Those at temperature 0."""
        return tuple(n for n in self.all if n[1].temperature == 0)


def make_pool(seed: int, vocab_size: int) -> Pool:
    """The pool of a seed."""
    lengths = [*SHORT, *SHORT, *MIDDLE, *LONG]
    drawn = compose(
        seed,
        batch_size=len(lengths) + 1,
        row=0,
        vocab_size=vocab_size,
        max_length=LONG[-1],
        max_tokens=TOKENS,
    )
    rng = random.Random(seed)
    needles: list[Needle] = []
    for i, (length, mate) in enumerate(zip(lengths, drawn.neighbour_sampling, strict=True)):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(length))
        hot = {"temperature": mate.temperature or 1.0, "seed": mate.seed}
        # Always some truncation: noise without it is another program to compile.
        cut = {"top_p": mate.top_p, "top_k": mate.top_k, "min_p": mate.min_p or 0.01}
        greedy = i < len(SHORT) or i % 2
        own: dict[str, Any] = {"temperature": 0.0} if greedy else {**hot, **cut}
        needles.append((prompt, SamplingParams(**own, max_tokens=TOKENS, ignore_eos=True)))

    def among(these: Sequence[int]) -> tuple[Needle, ...]:
        return tuple(n for n in needles if len(n[0]) in these)

    return Pool(among(SHORT), among(MIDDLE), among(LONG))


def _pages(batch: int) -> int:
    """Pages of the cache: a full batch of short requests beside a long one fits, no more."""
    return batch + batch // 2 + LONGEST // _PAGE


def engine_config(batch: int, *, prefix_caching: bool) -> EngineConfig:
    """One engine for all cases: few shapes, since their compiles are most of the time."""
    heights = (1, 4) if batch <= 16 else (1, 16)
    return EngineConfig(
        max_batch_size=batch,
        max_tokens_per_step=heights[1] * CHUNKS[0] + batch,
        max_model_len=LONGEST,
        page_size=_PAGE,
        num_pages=_pages(batch),
        chunk_sizes=CHUNKS,
        chunk_rows=heights,
        decode_rows=(1, batch),
        prefix_caching=prefix_caching,
        max_logit_bias=0,
    )


def _sizes(rng: random.Random, batch: int) -> int:
    """A batch size, often one at an edge."""
    edges = [n for n in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, batch) if n <= batch]
    return rng.choice(edges) if rng.random() < 0.5 else rng.randint(2, batch)


def _sent(needle: Needle, arrive: int = 0, cancel: int | None = None) -> Sent:
    return Sent(*needle, arrive, cancel)


def _batch_size(rng: random.Random, pool: Pool, batch: int) -> dict[str, Any]:
    """A request, and so many short ones that read and generate beside it, all alike in kind."""
    greedy = [n for n in pool.short if n[1].temperature == 0]
    first = rng.choice([*greedy, *greedy, *pool.greedy])
    mates = [rng.choice(greedy) for _ in range(_sizes(rng, batch) - 1)]
    return {"requests": (_sent(first), *(_sent(m) for m in mates))}


def _neighbours(rng: random.Random, pool: Pool, batch: int) -> dict[str, Any]:
    """Any requests in any order, with noise and without, one or two of them long."""
    size = _sizes(rng, batch)
    chosen = [rng.choice([n for n in pool.short if n[1].temperature > 0])]
    chosen += [rng.choice(pool.short) for _ in range(size - 3)]
    chosen += [rng.choice(pool.middle + pool.long) for _ in range(rng.randint(0, 1))]
    chosen.append(rng.choice([n for n in pool.greedy if n not in pool.short]))
    rng.shuffle(chosen)
    return {"requests": tuple(_sent(n) for n in chosen[:batch])}


def _padding(rng: random.Random, pool: Pool, batch: int) -> dict[str, Any]:
    """Prompts read in chunks of other shapes than alone."""
    # A middle prompt first: the short ones behind it are read in its wider chunks.
    first = rng.choice(pool.middle + pool.long)
    rest = [rng.choice(pool.short + pool.middle) for _ in range(rng.randint(1, min(6, batch - 1)))]
    return {"requests": (_sent(first), *(_sent(n, rng.randint(0, 3)) for n in rest))}


def _generate(rng: random.Random, pool: Pool) -> dict[str, Any]:
    """A call of `generate`: an engine with other pages and shapes."""
    greedy = [n for n in pool.short if n[1].temperature == 0]
    rows = tuple(_sent(rng.choice(greedy)) for _ in range(CALL_ROWS))
    return {"requests": rows, "front": "generate"}


def _score(rng: random.Random, pool: Pool) -> dict[str, Any]:
    """A call of `score`, of one width: with the completion, one at least is over 16 tokens."""
    wide = [n for n in pool.short if len(n[0]) + TOKENS > 16]
    rows = [rng.choice(wide), *(rng.choice(pool.short) for _ in range(CALL_ROWS - 1))]
    rng.shuffle(rows)
    return {"requests": tuple(_sent(n) for n in rows), "front": "score"}


def _chunks(rng: random.Random, pool: Pool, batch: int) -> dict[str, Any]:
    """Short prompts before and beside a long one: chunks are as long as the oldest wants."""
    target = rng.choice(pool.long + pool.middle[2:])
    before = [rng.choice(pool.short) for _ in range(rng.randint(1, min(5, batch - 2)))]
    after = [rng.choice(pool.short + pool.middle) for _ in range(rng.randint(0, 1))]
    sent = [*(_sent(n) for n in before), _sent(target), *(_sent(n) for n in after)]
    return {"requests": tuple(sent)}


def _prefix(rng: random.Random, pool: Pool, batch: int) -> dict[str, Any]:
    """A long prompt whose beginning another one, now running or long gone, had."""
    prompt, sampling = rng.choice(pool.long + pool.middle[2:])
    kept = rng.randint(_PAGE, len(prompt))
    other = tuple(rng.choice(prompt) for _ in range(rng.randint(0, 40)))
    first = (prompt[:kept] + other)[: LONG[-1]]
    own = dataclasses.replace(sampling, max_tokens=rng.choice([2, TOKENS]))
    arrive = rng.choice([3, 6, 9, LATER])
    mates = [rng.choice(pool.short) for _ in range(rng.randint(0, min(4, batch - 2)))]
    sent = [Sent(first, own), Sent(prompt, sampling, arrive)]
    return {"requests": (*sent, *(_sent(n, arrive) for n in mates)), "prefix_caching": True}


def _load(rng: random.Random, pool: Pool, batch: int) -> dict[str, Any]:
    """Requests that fill every page, the youngest at the end of its own; more come, and wait.

    Lengths just behind the end of a page ask for no other one in `TOKENS` tokens. One of 15
    does, when all have been read: so what is preempted had begun to generate.
    """
    of_pages = {
        17: [n for n in pool.long if len(n[0]) == 257],
        5: [n for n in pool.middle if len(n[0]) == 64],
        3: [n for n in pool.middle if len(n[0]) == 33],
        2: [n for n in pool.all if len(n[0]) in (16, 17)],
        1: [n for n in pool.short if len(n[0]) == 15],
    }
    sizes: list[int] = []
    last = rng.randint(1, 3) if batch > 8 else 1
    left, slots = _pages(batch) - last, batch - last
    while left:
        if left > 2 * slots or (not sizes and rng.random() < 0.5):
            size = next(n for n in ((5, 3) if sizes else (17, 5, 3)) if n <= left)
        else:
            size = min(left, 3 if slots == 1 else 2)
        sizes.append(size)
        left, slots = left - size, slots - 1
    sizes.sort(reverse=True)
    sent = [_sent(rng.choice(of_pages[size])) for size in sizes + last * [1]]
    late = [_sent(rng.choice(pool.short), rng.randint(1, 12)) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.5:
        gone = rng.randrange(len(sent))
        sent[gone] = dataclasses.replace(sent[gone], cancel=rng.randint(14, 20))
    return {"requests": (*sent, *sorted(late, key=lambda s: s.arrive))}


# Guarantees that a batch in an engine can break, and what makes its case.
_RECIPES: dict[str, Callable[[random.Random, Pool, int], dict[str, Any]]] = {
    "G1": _batch_size,
    "G2": _neighbours,
    "G3": _padding,
    "G4": _chunks,
    "G5": _prefix,
    "G7": _load,
    "G10": _neighbours,
}
COMPOSED = (*_RECIPES, "G6")


def make_case(
    guarantee: str,
    index: int,
    *,
    seed: int,
    pool: Pool,
    batch: int,
    tokens_of: Callable[[Needle], Sequence[int]],
) -> Case:
    """Case `index` of a guarantee: a function of the arguments alone.

    `tokens_of` gives the tokens that a needle generates alone.
    """
    rng = random.Random(f"{seed} {guarantee} {index}")
    if guarantee == "G3" and index % 4 == 1:
        return Case(guarantee, index, **_generate(rng, pool))
    if guarantee != "G6":
        return Case(guarantee, index, **_RECIPES[guarantee](rng, pool, batch))
    if index % 2 == 0:
        return Case(guarantee, index, **_score(rng, pool))
    sent = []
    for needle in rng.sample(pool.greedy, rng.randint(1, min(3, len(pool.greedy)))):
        read = rng.randint(1, TOKENS - 1)
        prompt = needle[0] + tuple(tokens_of(needle)[:read])
        params = dataclasses.replace(needle[1], max_tokens=TOKENS - read, prompt_logprobs=0)
        sent.append(Sent(prompt, params, read=read))
    mates = [_sent(rng.choice(pool.short)) for _ in range(rng.randint(0, min(4, batch - 3)))]
    return Case(guarantee, index, (*sent, *mates))
