"""The promise on whole models: one request has one set of bits, in any batch.

Log-probs are compared as bit patterns, never within a tolerance. `xla`, the same model code
on plain XLA, must fail each comparison: that is what shows that it can fail.
"""

import dataclasses
import functools
import hashlib
import subprocess
import sys
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdet
from jdet.cache import create_cache
from jdet.decoding import Group, prompt_positions
from jdet.models.config import DecoderConfig
from jdet.models.load import LanguageModel
from jdet.ops import Ops
from jdet.sampling import SamplingParams
from jdet.testing import (
    compose,
    run_batch,
    run_composition,
    same_bits,
    small_config,
    tiny_config,
)
from jdet.testing.compositions import Generated

MAX_TOKENS = 6
# One token; inside a split of 256; across its end while generating; three splits.
PROMPT_LENGTHS = (1, 40, 253, 601)
WIDTH, CACHE = 640, 1024


@functools.cache
def model(family: str, dtype: str, implementation: str) -> LanguageModel:
    config = DecoderConfig.from_hf(small_config(family))  # pyright: ignore[reportArgumentType]
    return jdet.random_model(config, dtype=dtype, implementation=implementation)


def prompt_of(length: int, vocab_size: int = 1536) -> list[int]:
    return np.random.default_rng(length).integers(0, vocab_size, length).tolist()


def request_of(length: int) -> tuple[list[int], SamplingParams]:
    """Long prompts greedy, short ones sampled: both kinds of a row's end of the step."""
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    if length < 100:
        sampling = SamplingParams(
            temperature=0.8, top_p=0.95, min_p=0.01, seed=length, max_tokens=MAX_TOKENS
        )
    return prompt_of(length), sampling


@functools.cache
def alone(family: str, dtype: str, implementation: str, length: int) -> Generated:
    """The request by itself: no padding, the shortest cache."""
    prompt, sampling = request_of(length)
    return run_composition(
        model(family, dtype, implementation), prompt, sampling, max_tokens=MAX_TOKENS
    )


def in_batch(
    family: str, dtype: str, implementation: str, batch_size: int, *, poison: bool
) -> dict[int, Generated]:
    """All requests in one batch, at random rows among random neighbours."""
    rng = np.random.default_rng(batch_size)
    crowd = compose(
        batch_size,
        batch_size=batch_size - len(PROMPT_LENGTHS) + 1,
        row=0,
        vocab_size=1536,
        max_length=WIDTH,
        max_tokens=MAX_TOKENS,
    )
    requests = [request_of(length) for length in PROMPT_LENGTHS]
    requests += [
        (list(p), s) for p, s in zip(crowd.neighbours, crowd.neighbour_sampling, strict=True)
    ]
    order = rng.permutation(batch_size)
    assert len(requests) == batch_size
    out = run_batch(
        model(family, dtype, implementation),
        [requests[i] for i in order],
        max_tokens=MAX_TOKENS,
        width=WIDTH,
        cache_length=CACHE,
        cache_fill=float("nan") if poison else 0.0,
        poison_padding=poison,
    )
    return {length: out[int(np.argmax(order == i))] for i, length in enumerate(PROMPT_LENGTHS)}


# Around the heights at which a kernel may change; each batch size is a compile.
CASES = [
    *(("llama", "bfloat16", n) for n in (4, 8, 9, 33, 64)),
    *(("llama", "float32", n) for n in (4, 9, 33)),
    *(("qwen3", "bfloat16", n) for n in (4, 9)),
]


@pytest.mark.parametrize(("family", "dtype", "batch_size"), CASES)
def test_a_request_has_the_same_bits_in_any_batch(family: str, dtype: str, batch_size: int) -> None:
    for length, got in in_batch(family, dtype, "portable", batch_size, poison=True).items():
        assert len(got[0]) == MAX_TOKENS
        assert np.isfinite(got[1]).all()
        assert same_bits(got, alone(family, dtype, "portable", length)), (length, got)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain_xla_fails_the_same_comparison(dtype: str) -> None:
    got = in_batch("llama", dtype, "xla", 9, poison=False)
    assert not all(same_bits(got[n], alone("llama", dtype, "xla", n)) for n in PROMPT_LENGTHS)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    batch_size=st.sampled_from((3, 6)),
    place=st.integers(0, 5),
    seed=st.integers(0, 2**16),
    length=st.sampled_from((1, 253)),
)
def test_any_composition_gives_the_solo_bits(
    batch_size: int, place: int, seed: int, length: int
) -> None:
    prompt, sampling = request_of(length)
    crowd = compose(
        seed,
        batch_size=batch_size,
        row=place % batch_size,
        vocab_size=1536,
        max_length=300,
        max_tokens=MAX_TOKENS,
        width=300,
        cache_length=512,
    )
    got = run_composition(
        model("llama", "bfloat16", "portable"),
        prompt,
        sampling,
        crowd,
        max_tokens=MAX_TOKENS,
        cache_fill=float("nan"),
        poison_padding=True,
    )
    assert same_bits(got, alone("llama", "bfloat16", "portable", length))


# Over three splits of 16 keys and past a window of 20.
LONG = 37


@functools.cache
def family_model(family: str, implementation: str) -> LanguageModel:
    config = DecoderConfig.from_hf(tiny_config(family))  # pyright: ignore[reportArgumentType]
    if len(config.windows) == 1:  # its layers are alike
        config = dataclasses.replace(config, num_hidden_layers=1)
    return jdet.random_model(
        config, implementation=implementation, contract=jdet.Contract(kv_split=16)
    )


@functools.cache
def prompt_and_step(ops: Ops, cache_length: int, step: bool) -> Callable[..., jax.Array]:
    """Log-probs after the prompts of a batch and, by a step, after one token more: [B, 1 or 2, V].

    The decoder alone, since the families share the rest: sampling takes longest to compile.
    """

    def run(decoder, tokens, lengths, following, unused):
        cache = create_cache(decoder.config, len(tokens), cache_length, decoder.dtype, unused)
        prompts = Group(tokens, prompt_positions(tokens, lengths))
        (hidden,), cache = decoder((prompts,), cache, ops)
        ends = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        if step:
            (more,), _ = decoder((Group(following[:, None], lengths[:, None]),), cache, ops)
            ends = jnp.concatenate([ends, more], 1)
        return ops.log_softmax(decoder.logits(ends, ops))

    return jdet.jit(run, implementation=ops.implementation)


def family_batch(family: str, implementation: str, batch_size: int) -> np.ndarray:
    """Log-probs of one request at a random row of a batch; alone if its size is 1."""
    model = family_model(family, implementation)
    rng = np.random.default_rng(batch_size)
    poison = implementation != "xla"
    width, cache_length = (LONG, 48) if batch_size == 1 else (44, 64)
    lengths = rng.integers(1, 44, batch_size)
    place = int(rng.integers(batch_size))
    lengths[place] = LONG
    tokens = np.full((batch_size, width), model.config.vocab_size if poison else 0, np.int32)
    following = rng.integers(0, 160, batch_size)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(0, 160, length)
    tokens[place, :LONG], following[place] = prompt_of(LONG, 160), 7
    step = family == "gemma3"  # it has what the others have, but for biases
    run = prompt_and_step(model.ops, cache_length, step)
    out = run(
        model.decoder,
        jnp.asarray(tokens),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(following, jnp.int32),
        float("nan") if poison else 0.0,
    )
    assert out.shape == (batch_size, 1 + step, 160), "another batch was formed"
    return np.asarray(out)[place]


@pytest.mark.parametrize(("family", "batch_size"), [("mistral", 4), ("qwen2", 33), ("gemma3", 9)])
def test_each_family_has_the_same_bits_in_any_batch(family: str, batch_size: int) -> None:
    alone = family_batch(family, "portable", 1)
    crowd = family_batch(family, "portable", batch_size)
    assert np.isfinite(crowd).all()
    assert alone.tobytes() == crowd.tobytes()


def test_plain_xla_fails_the_comparison_of_a_family() -> None:
    alone, small = (family_batch("gemma3", "xla", n) for n in (1, 9))
    assert alone.tobytes() != small.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_decode_step_equals_a_prefill_of_the_same_tokens(dtype: str) -> None:
    """The token at step i, and its log-prob, from a prompt that already holds steps 0..i-1."""
    m = model("llama", dtype, "portable")
    steps = 8
    prompt = prompt_of(252)  # the steps cross the end of the first split
    sampling = SamplingParams(temperature=0, max_tokens=steps)
    ids, logprobs = run_composition(m, prompt, sampling, max_tokens=steps)
    requests = [
        (prompt + ids[:i], SamplingParams(temperature=0, max_tokens=1)) for i in range(steps)
    ]
    again = run_batch(m, requests, max_tokens=1, width=288)
    assert [g[0][0] for g in again] == ids
    assert np.concatenate([g[1] for g in again]).tobytes() == logprobs.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_score_gives_the_bits_that_generate_gave(dtype: str) -> None:
    m = model("llama", dtype, "portable")
    prompts = [prompt_of(n) for n in (1, 7, 250, 300)]
    sampling = [SamplingParams(temperature=t, seed=3, max_tokens=12) for t in (0.0, 1.0, 0.7, 0.0)]
    completions = jdet.generate(m, prompts, sampling)
    scores = jdet.score(m, [c.prompt_token_ids + c.token_ids for c in completions])
    for completion, values in zip(completions, scores, strict=True):
        assert len(completion.logprobs) == 12
        assert values[-12:] == completion.logprobs


def test_plain_xla_scores_other_bits_than_it_generates() -> None:
    m = model("llama", "bfloat16", "xla")
    completions = jdet.generate(
        m, [prompt_of(7), prompt_of(250)], SamplingParams(temperature=0, max_tokens=12)
    )
    scores = jdet.score(m, [c.prompt_token_ids + c.token_ids for c in completions])
    assert any(v[-12:] != c.logprobs for c, v in zip(completions, scores, strict=True))


def test_tensor_parallel_leaves_change_the_bits_and_the_fingerprint() -> None:
    """So that the number of leaves is seen to be part of the contract, and not a schedule."""
    m = model("llama", "float32", "portable")
    cut = m.with_ops(contract=jdet.Contract(leaves=8))
    prompt, sampling = request_of(40)
    a = run_composition(m, prompt, sampling, max_tokens=MAX_TOKENS)
    b = run_composition(cut, prompt, sampling, max_tokens=MAX_TOKENS)
    assert not same_bits(a, b)
    assert m.ops.fingerprint != cut.ops.fingerprint


CHILD = """
import os, sys
if sys.argv[1] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import hashlib, numpy as np, jdet
from jdet.models.config import DecoderConfig
from jdet.testing import run_composition, small_config
from jdet.sampling import SamplingParams
model = jdet.random_model(DecoderConfig.from_hf(small_config()), implementation="portable")
prompt = np.random.default_rng(40).integers(0, 1536, 40).tolist()
sampling = SamplingParams(temperature=0.8, top_p=0.95, min_p=0.01, seed=40, max_tokens=6)
ids, logprobs = run_composition(model, prompt, sampling, max_tokens=6)
print(hashlib.sha256(np.array(ids, np.int32).tobytes() + logprobs.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("cores", ["1", "all"])
def test_another_process_gives_the_same_bits_on_any_number_of_cores(cores: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, cores], capture_output=True, text=True, check=True
    )
    ids, logprobs = alone("llama", "bfloat16", "portable", 40)
    own = hashlib.sha256(np.array(ids, np.int32).tobytes() + logprobs.tobytes()).hexdigest()
    assert done.stdout.split()[-1] == own
