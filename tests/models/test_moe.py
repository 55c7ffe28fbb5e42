"""Experts in a layer and in a whole decoder: a token's bits are its own, whoever else is routed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdet
from jdet.cache import create_cache
from jdet.decoding import Group, prompt_positions
from jdet.models.config import DecoderConfig
from jdet.models.load import LanguageModel
from jdet.models.moe import Experts
from jdet.testing import small_config

CONFIG = DecoderConfig.from_hf(small_config("qwen3_moe", vocab_size=160))
TOKENS = 65
# A token's direction and that of the experts it goes to: all to the same three, or anywhere.
KINDS = ("anywhere", "all to three")


@functools.cache
def layer(dtype: str) -> Experts:
    return Experts(CONFIG, jnp.dtype(dtype), nnx.Rngs(0))


@functools.cache
def tokens(kind: str, dtype: str) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((TOKENS, CONFIG.hidden_size), np.float32)
    if kind == "all to three":
        router = np.asarray(layer(dtype).router[...], np.float32)
        x = 0.3 * x + 4 * router[[1, 4, 6]].sum(0)
    return x.astype(jnp.dtype(dtype))


@functools.cache
def run(implementation: str):
    ops = jdet.Ops(implementation)
    return jdet.jit(lambda experts, x, routed: experts(x, routed, ops))


@functools.cache
def whole(kind: str, dtype: str, implementation: str) -> np.ndarray:
    """What every token gets where all are routed, as integers."""
    y = run(implementation)(layer(dtype), tokens(kind, dtype), np.ones(TOKENS, bool))
    assert np.isfinite(np.asarray(y, np.float32)).all()
    return bits(y)


def bits(y: jax.Array | np.ndarray) -> np.ndarray:
    y = np.asarray(y)
    return y.view({2: np.uint16, 4: np.uint32}[y.dtype.itemsize])


def routed_experts(kind: str, dtype: str) -> set[int]:
    logits = (
        tokens(kind, dtype).astype(np.float64) @ np.asarray(layer(dtype).router[...], np.float64).T
    )
    return set(np.argsort(-logits, axis=-1)[:, :3].ravel().tolist())


def test_the_batches_are_what_they_are_called() -> None:
    assert routed_experts("anywhere", "bfloat16") == set(range(8))
    assert routed_experts("all to three", "bfloat16") == {1, 4, 6}


@pytest.mark.parametrize("implementation", ["reference", "portable", "xla"])
def test_layer_against_float64(implementation: str) -> None:
    x = tokens("anywhere", "float32")[:9]
    y = np.asarray(run(implementation)(layer("float32"), x, np.ones(9, bool)))
    router, gate_up, down = (
        np.asarray(w[...], np.float64)
        for w in (layer("float32").router, layer("float32").gate_up, layer("float32").down)
    )
    logits = x.astype(np.float64) @ router.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    for token, of_token in enumerate(p):
        best = np.argsort(-of_token)[:3]
        want = np.zeros(CONFIG.hidden_size)
        for e in best:
            gate, up = np.split(gate_up[e] @ x[token].astype(np.float64), 2)
            inner = gate / (1 + np.exp(-gate)) * up
            want += of_token[e] / of_token[best].sum() * (down[e] @ inner)
        np.testing.assert_allclose(y[token], want, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [*(("bfloat16", n) for n in (1, 32, 33)), ("float32", 31)],
)
def test_token_does_not_follow_the_batch(dtype: str, size: int) -> None:
    """Of both kinds, at other rows than among 65, and among padding that holds NaN."""
    for kind in KINDS:
        x = tokens(kind, dtype)
        pick = (np.arange(size) + 11) % TOKENS
        padded = np.full((size + size % 3, x.shape[1]), np.nan, x.dtype)
        at = np.arange(size) + size % 3 // 2
        padded[at] = x[pick]
        routed = np.isin(np.arange(len(padded)), at)
        y = np.asarray(run("portable")(layer(dtype), padded, routed))
        np.testing.assert_array_equal(bits(y[at]), whole(kind, dtype, "portable")[pick])
        assert (y[~routed] == 0).all()


def test_plain_xla_follows_the_batch() -> None:
    x = tokens("anywhere", "float32")
    alone = [bits(run("xla")(layer("float32"), x[i : i + 1], np.ones(1, bool))) for i in range(9)]
    assert (np.concatenate(alone) != whole("anywhere", "float32", "xla")[:9]).any()


# Over two splits of 16 keys.
PROMPTS = tuple(np.random.default_rng(n).integers(0, 160, n).astype(np.int32) for n in (1, 9, 20))
WIDTH, CACHE = 24, 32


@functools.cache
def decoder(implementation: str) -> LanguageModel:
    contract = jdet.Contract(kv_split=16)
    return jdet.random_model(CONFIG, implementation=implementation, contract=contract)


@functools.cache
def logits_after(implementation: str):
    """Of a batch of prompts, after their last tokens."""
    model = decoder(implementation)

    def forward(weights, prompts, lengths):
        positions = prompt_positions(prompts, lengths)
        # Plain XLA multiplies unused slots by 0.
        unused = 0.0 if implementation == "xla" else float("nan")
        cache = create_cache(model.config, len(prompts), CACHE, weights.dtype, unused)
        (hidden,), _ = weights((Group(prompts, positions),), cache, model.ops)
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return weights.logits(last, model.ops)

    return jdet.jit(forward, implementation=implementation)


def batch(prompts: list[np.ndarray], implementation: str) -> np.ndarray:
    """The bits of the logits; padding is a token outside the vocabulary, whose embedding is NaN."""
    tokens = np.full((len(prompts), WIDTH), 160, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in prompts], np.int32)
    y = np.asarray(logits_after(implementation)(decoder(implementation).decoder, tokens, lengths))
    assert y.shape == (len(prompts), 160) and np.isfinite(y).all()
    return bits(y)


def crowd(size: int) -> list[np.ndarray]:
    """The prompts at the end of a batch of others."""
    rng = np.random.default_rng(size)
    lengths = rng.integers(1, WIDTH + 1, size - len(PROMPTS))
    return [rng.integers(0, 160, n).astype(np.int32) for n in lengths] + list(PROMPTS)


@functools.cache
def alone(implementation: str) -> np.ndarray:
    return np.concatenate([batch([prompt], implementation) for prompt in PROMPTS])


@pytest.mark.parametrize("size", [4, 9, 33])
def test_request_has_the_same_bits_in_any_batch(size: int) -> None:
    got = batch(crowd(size), "portable")[-len(PROMPTS) :]
    np.testing.assert_array_equal(got, alone("portable"))


def test_plain_xla_fails_the_same_comparison() -> None:
    assert (batch(crowd(9), "xla")[-len(PROMPTS) :] != alone("xla")).any()
