"""Right, not only invariant: logits against transformers (scripts/goldens made the files).

Two implementations round differently, so here, and only here, values are compared within
a tolerance; float32, where another order of the sums moves a logit by about 1e-4.
"""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jdet
from jdet.cache import create_cache
from jdet.decoding import Group
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 1e-3


@functools.cache
def smollm2() -> LanguageModel:
    return jdet.load(dtype="float32", implementation="portable")


def logits_of(model: LanguageModel, ids: np.ndarray) -> np.ndarray:
    """All logits of one sequence, [T, V]."""

    def forward(decoder, tokens):
        cache = create_cache(decoder.config, 1, 512, decoder.dtype)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        (hidden,), _ = decoder((Group(tokens, positions),), cache, model.ops)
        return decoder.logits(hidden[0], model.ops)

    run = jdet.jit(forward, implementation=model.ops.implementation)
    return np.asarray(run(model.decoder, jnp.asarray(ids[None], jnp.int32)))


@pytest.mark.parametrize("implementation", ["reference", "portable", "xla"])
@pytest.mark.parametrize("which", ["0", "1"])
def test_tiny_qwen3_logits_are_those_of_transformers(implementation: str, which: str) -> None:
    golden = np.load(GOLDENS / "tiny_qwen3_logits.npz")
    model = jdet.load(str(GOLDENS / "tiny_qwen3"), dtype="float32", implementation=implementation)
    got = logits_of(model, golden[f"ids_{which}"])
    np.testing.assert_allclose(got, golden[f"logits_{which}"], atol=TOLERANCE, rtol=0)


def test_smollm2_scores_and_logits_are_those_of_transformers() -> None:
    golden = np.load(GOLDENS / "smollm2_logits.npz")
    model = smollm2()
    names = ("chat", "prose", "long")
    scores = jdet.score(model, [golden[f"{n}_ids"].tolist() for n in names])
    for name, values in zip(names, scores, strict=True):
        np.testing.assert_allclose(
            values, golden[f"{name}_next_logprobs"], atol=TOLERANCE, rtol=0, err_msg=name
        )
    logits = logits_of(model, golden["prose_ids"])
    np.testing.assert_allclose(logits[-1], golden["prose_last_logits"], atol=TOLERANCE, rtol=0)
    assert (logits.argmax(-1) == golden["prose_argmax"]).all()


def test_smollm2_writes_the_text_of_transformers() -> None:
    golden = np.load(GOLDENS / "smollm2_logits.npz")
    model = smollm2()
    assert model.tokenizer is not None
    prompt = model.tokenizer.chat_prompt(
        [{"role": "user", "content": "Tell me about Richard Feynman"}]
    )
    assert model.tokenizer.encode(prompt) == golden["chat_ids"].tolist()
    wanted = golden["chat_greedy"][:40].tolist()
    (completion,) = jdet.generate(
        model, [prompt], SamplingParams(temperature=0, max_tokens=len(wanted))
    )
    assert completion.token_ids == wanted
    assert completion.text == model.tokenizer.decode(wanted)


def test_smollm2_chooses_the_200_tokens_of_transformers() -> None:
    """Greedy text, from one prefill of it: after each token, the next is the argmax."""
    golden = np.load(GOLDENS / "smollm2_logits.npz")
    prompt, wanted = golden["chat_ids"], golden["chat_greedy"]
    # Where the second best is nearer than two implementations round, either may be chosen.
    assert len(wanted) == 200 and golden["chat_greedy_margins"].min() > 2 * TOLERANCE
    logits = logits_of(smollm2(), np.concatenate([prompt, wanted[:-1]]))
    assert (logits[len(prompt) - 1 :].argmax(-1) == wanted).all()
