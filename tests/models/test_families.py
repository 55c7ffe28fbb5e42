"""Each family: logits against transformers, from small files in its published format.

scripts/goldens/make_tiny_families.py made them. Two implementations round differently, so values
are compared within a tolerance, in float32.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jdet
import jdet.models.families
from jdet.cache import create_cache
from jdet.decoding import Group
from jdet.models.config import CONFIGS, DecoderConfig
from jdet.models.families import FAMILIES
from jdet.models.load import LanguageModel
from jdet.testing import small_config

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = (
    "tiny_llama3",
    "tiny_llama_linear",
    "tiny_mistral",
    "tiny_qwen2",
    "tiny_qwen3_yarn",
    "tiny_qwen3_moe",
    "tiny_gemma3",
)
TOLERANCE = 1e-4  # of logits up to 5; what float32 sums in another order move them by is 1e-5
SPLIT, LENGTH = 16, 48  # three splits of the keys


@functools.cache
def tiny(name: str, implementation: str = "portable") -> LanguageModel:
    return jdet.load(
        str(GOLDENS / name),
        dtype="float32",
        implementation=implementation,
        contract=jdet.Contract(kv_split=SPLIT),
    )


def logits_of(model: LanguageModel, rows: list[np.ndarray]) -> list[np.ndarray]:
    """All logits of some sequences, in one batch padded to LENGTH."""
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    positions = np.full((len(rows), LENGTH), -1, np.int32)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = ids
        positions[i, : len(ids)] = np.arange(len(ids))

    def forward(decoder, tokens, positions):
        # Plain XLA multiplies unused slots by 0.
        unused = 0.0 if model.ops.implementation == "xla" else float("nan")
        cache = create_cache(decoder.config, len(rows), LENGTH, decoder.dtype, unused)
        (hidden,), _ = decoder((Group(tokens, positions),), cache, model.ops)
        return decoder.logits(hidden, model.ops)

    run = jdet.jit(forward, implementation=model.ops.implementation)
    out = np.asarray(run(model.decoder, jnp.asarray(tokens), jnp.asarray(positions)))
    return [out[i, : len(ids)] for i, ids in enumerate(rows)]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "portable") for name in NAMES), ("tiny_gemma3", "xla")],
)
def test_logits_are_those_of_transformers(name: str, implementation: str) -> None:
    golden = np.load(GOLDENS / name / "logits.npz")
    model = tiny(name, implementation)
    ids = [golden["ids_0"], golden["ids_1"]]
    windows = [w for w in model.config.windows if w is not None]
    original = model.config.rope.original_max_position_embeddings
    assert len(ids[1]) > max([2 * SPLIT, original, *windows])
    for i, got in enumerate(logits_of(model, ids)):
        np.testing.assert_allclose(got, golden[f"logits_{i}"], atol=TOLERANCE, rtol=0)


def test_every_family_has_a_golden_and_a_readme() -> None:
    assert {tiny(name).config.family for name in NAMES} | {"qwen3"} == set(FAMILIES)
    readmes = Path(jdet.models.families.__file__).parent.glob("*/README.md")
    assert {path.parent.name for path in readmes} == set(FAMILIES)


def test_features_are_read() -> None:
    llama, gemma = tiny("tiny_llama3"), tiny("tiny_gemma3")
    assert llama.config.rope.kind == "llama3" and llama.config.tie_word_embeddings
    assert llama.decoder.layers[0].attention.out_bias is not None
    assert (tiny("tiny_mistral").config.windows, llama.config.windows) == ((9,), (None,))
    assert tiny("tiny_qwen2").config.windows == (None, 9)
    assert gemma.config.windows == (9, 9, None)
    assert [gemma.config.rope_index(i) for i in range(3)] == [1, 1, 0]
    assert [r.theta for r in gemma.config.ropes] == [20000.0, 500.0]
    # 1 + w, in float32 in a model of bfloat16 too.
    half = jdet.load(str(GOLDENS / "tiny_gemma3"), dtype="bfloat16", implementation="portable")
    stored = safetensors.numpy.load_file(GOLDENS / "tiny_gemma3" / "model.safetensors")
    norm = np.asarray(half.decoder.norm[...])
    assert norm.dtype == np.float32
    np.testing.assert_array_equal(norm, 1 + stored["model.norm.weight"].astype(np.float32))


def test_both_spellings_of_a_rope_are_one() -> None:
    """transformers 5 writes rope_parameters; the files people published have rope_theta."""
    base = small_config("llama")
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"rope_type": "llama3", "original_max_position_embeddings": 256}
    old = {**base, "rope_theta": 5e5, "rope_scaling": scaling}
    new = {**base, "rope_theta": None, "rope_parameters": {**scaling, "rope_theta": 5e5}}
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)
    assert DecoderConfig.from_hf(old).rope.factor == 8.0

    gemma = dict(FAMILIES["gemma3"].published["Gemma-3-270m"])
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {**gemma, "rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": linear}
    full, local = {**linear, "rope_theta": 2e6}, {"rope_type": "default", "rope_theta": 2e4}
    parameters = {"full_attention": full, "sliding_attention": local}
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(
        {**gemma, "rope_parameters": parameters}
    )


def test_published_values() -> None:
    """Of each family something that only the right reading gives."""
    assert CONFIGS["Llama-3.2-1B"].rope.factor == 32 and CONFIGS["Llama-3.2-1B"].head_dim == 64
    assert CONFIGS["Mistral-7B-v0.3"].windows == (None,)
    assert CONFIGS["Mistral-7B-v0.1"].windows == (4096,)
    assert CONFIGS["Qwen2.5-7B"].qkv_bias and not CONFIGS["Qwen2.5-7B"].out_bias
    gemma = CONFIGS["Gemma-3-4B"]
    assert (gemma.rope.kind, gemma.rope.factor, gemma.rope.theta) == ("linear", 8.0, 1e6)
    assert (gemma.local_rope, gemma.attention_scale) == (type(gemma.rope)(1e4), 1 / 16)
    assert [i for i in range(gemma.num_hidden_layers) if gemma.window(i) is None] == [
        5, 11, 17, 23, 29,
    ]  # fmt: skip


def test_window_as_long_as_the_context_is_none() -> None:
    config = {**small_config(), "model_type": "mistral", "sliding_window": 2048}
    assert DecoderConfig.from_hf(config).windows == (None,)
    assert DecoderConfig.from_hf({**config, "sliding_window": 2047}).windows == (2047,)


def test_llama3_frequencies_meet_their_definition() -> None:
    """Kept above high_freq_factor turns in the original length, divided below low_freq_factor."""
    rope = CONFIGS["Llama-3.1-8B"].rope
    unscaled = dataclasses.replace(rope, kind="default").frequencies(128)
    ratio = rope.frequencies(128) / unscaled
    turns = 8192 * unscaled / (2 * np.pi)
    assert (ratio[turns >= 4] == 1).all() and np.allclose(ratio[turns <= 1], 1 / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((ratio[between] > 1 / 8) & (ratio[between] < 1)).all()


def test_yarn_in_both_spellings_of_qwen() -> None:
    """Qwen2.5's recipe says `type`, Qwen3's `rope_type`; neither raises the maximum."""
    recipe = {"factor": 4.0, "original_max_position_embeddings": 32768}
    for name, key in (("Qwen2.5-7B", "type"), ("Qwen3-8B", "rope_type")):
        published = FAMILIES["qwen2" if key == "type" else "qwen3"].published[name]
        scaled = DecoderConfig.from_hf({**published, "rope_scaling": {key: "yarn", **recipe}})
        assert scaled.max_position_embeddings == 131072
        assert scaled.rope.attention_factor == 0.1 * np.log(4) + 1
        ratio = CONFIGS[name].rope.frequencies(128) / scaled.rope.frequencies(128)
        assert ratio[0] == 1 and ratio[-1] == 4 and (np.diff(ratio) >= 0).all()
    # A window as long as the unscaled context hides keys of the scaled one.
    windows = {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 0}
    scaling = {"rope_type": "yarn", **recipe}
    long = {**FAMILIES["qwen2"].published["Qwen2.5-0.5B"], **windows}
    assert set(DecoderConfig.from_hf(long).windows) == {None}
    assert set(DecoderConfig.from_hf({**long, "rope_scaling": scaling}).windows) == {32768}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"beta_fast": 0.5}, "beta_fast=0.5, beta_slow=1.0"),
        ({"factor": 0.5}, "factor=0.5"),
        ({"factor": None}, "factor=None"),
        ({"mscale": "x", "mscale_all_dim": 1.0}, "mscale='x'"),
    ],
)
def test_yarn_that_cannot_be_meant_is_refused(change: dict[str, Any], words: str) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, **change}
    config = {**FAMILIES["qwen3"].published["Qwen3-8B"], "rope_scaling": scaling}
    with pytest.raises(ValueError, match=words):
        DecoderConfig.from_hf(config)


@pytest.mark.parametrize(
    "prefix",
    [("model.language_model.", "lm_head."), ("language_model.model.", "language_model.lm_head.")],
)
def test_multimodal_file_gives_its_text_part(prefix: tuple[str, str], tmp_path: Path) -> None:
    source = GOLDENS / "tiny_gemma3"
    stored = safetensors.numpy.load_file(source / "model.safetensors")
    renamed = {prefix[0] + name.removeprefix("model."): value for name, value in stored.items()}
    renamed["vision_tower.vision_model.post_layernorm.weight"] = np.zeros(3, np.float32)
    renamed["model.multi_modal_projector.mm_soft_emb_norm.weight"] = np.zeros(3, np.float32)
    renamed[prefix[1] + "weight"] = stored["model.embed_tokens.weight"]
    safetensors.numpy.save_file(renamed, tmp_path / "model.safetensors")
    text = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    model = jdet.load(str(tmp_path), dtype="float32", implementation="portable")
    assert model.config == tiny("tiny_gemma3").config
    ours, theirs = (m.decoder.layers[2].attention.out for m in (model, tiny("tiny_gemma3")))
    assert (np.asarray(ours[...]) == np.asarray(theirs[...])).all()
