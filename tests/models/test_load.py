"""Loading: everything wrong with a checkpoint in one error, before anything is read."""

import dataclasses
import json
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jdet
import jdet.models.load
from jdet.io.checkpoint import open_checkpoint
from jdet.models.checkpoint import check_tensors, entries
from jdet.models.config import CONFIGS, DecoderConfig
from jdet.models.load import check_memory, default_for
from jdet.testing import small_config

GOLDEN = Path(__file__).parents[1] / "goldens" / "tiny_qwen3"
EXPERTS = small_config("qwen3_moe")


@dataclasses.dataclass(frozen=True)
class FakeTensor:
    shape: tuple[int, ...]

    def read(self, dtype: Any) -> np.ndarray:
        raise AssertionError("read before the check")


def copy_of_golden(folder: Path, change) -> Path:
    tensors = safetensors.numpy.load_file(GOLDEN / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((GOLDEN / "config.json").read_text())
    return folder


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.layers.1.self_attn.q_norm.weight"]
        tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((3, 5), np.float32)
        tensors["model.layers.0.mlp.gate_bias"] = np.zeros(3, np.float32)

    with pytest.raises(ValueError) as error:
        jdet.load(str(copy_of_golden(tmp_path, change)), dtype="float32")
    for part in ("missing model.layers.1.self_attn.q_norm", "down_proj", "unexpected", "gate_bias"):
        assert part in str(error.value)


def test_parameters_are_the_files_tensors() -> None:
    model = jdet.load(str(GOLDEN), dtype="float32", implementation="portable")
    tensors = safetensors.numpy.load_file(GOLDEN / "model.safetensors")
    layer = model.decoder.layers[1]
    assert layer.mlp is not None
    qkv = [tensors[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv"]
    assert (np.asarray(layer.attention.qkv[...]) == np.concatenate(qkv)).all()
    assert (np.asarray(layer.mlp.down[...]) == tensors["model.layers.1.mlp.down_proj.weight"]).all()
    assert (np.asarray(model.decoder.embedding[...]) == tensors["model.embed_tokens.weight"]).all()


def test_experts_are_stacked_and_checked_one_by_one() -> None:
    """Gate above up in each expert, experts in order, and only in the layers that have them."""
    path = GOLDEN.with_name("tiny_qwen3_moe")
    model = jdet.load(str(path), dtype="float32", implementation="portable")
    assert [model.config.has_experts(i) for i in range(3)] == [True, False, True]
    every_other = dataclasses.replace(model.config, mlp_only_layers=(), decoder_sparse_step=2)
    assert [every_other.has_experts(i) for i in range(4)] == [False, True, False, True]
    tensors = dict(open_checkpoint(path).tensors)
    experts = model.decoder.layers[2].experts
    assert experts is not None and model.decoder.layers[1].experts is None
    for e in range(6):
        name = f"model.layers.2.mlp.experts.{e}."
        parts = [tensors[f"{name}{part}_proj.weight"].read(np.float32) for part in ("gate", "up")]
        assert (np.asarray(experts.gate_up[...][e]) == np.concatenate(parts)).all()
        down = tensors[f"{name}down_proj.weight"].read(np.float32)
        assert (np.asarray(experts.down[...][e]) == down).all()
    flat = dict(nnx.to_flat_state(nnx.state(model.decoder)))
    fakes: dict[str, Any] = {name: FakeTensor(t.shape) for name, t in tensors.items()}
    fakes["model.layers.0.mlp.experts.3.down_proj.weight"] = FakeTensor((24, 32))
    del fakes["model.layers.2.mlp.experts.5.up_proj.weight"]
    with pytest.raises(ValueError) as error:
        check_tensors(model.config, fakes, lambda path: flat[path].shape, "file")
    assert str(error.value).removeprefix("file does not fit its config: ").split("; ") == [
        "missing model.layers.2.mlp.experts.5.up_proj.weight",
        "model.layers.0.mlp.experts.3.down_proj.weight: (24, 32), expected (32, 24)",
    ]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_published_shapes_have_a_complete_map(name: str) -> None:
    """Every tensor is named once, and the sizes add up to the published parameter count."""
    config = CONFIGS[name]
    names = [n for _, group in entries(config) for n in group]
    assert len(names) == len(set(names))
    published = {
        "SmolLM2-135M": 134.5e6,
        "Llama-3.1-8B": 8.03e9,
        "Llama-3.2-1B": 1.236e9,
        "Llama-3.2-3B": 3.213e9,
        "Mistral-7B-v0.1": 7.242e9,
        "Mistral-7B-v0.3": 7.248e9,
        "Qwen2.5-0.5B": 494e6,
        "Qwen2.5-7B": 7.616e9,
        "Qwen3-0.6B": 596e6,
        "Qwen3-1.7B": 1.72e9,
        "Qwen3-4B": 4.02e9,
        "Qwen3-8B": 8.19e9,
        "Qwen3-14B": 14.8e9,
        "Qwen3-32B": 32.8e9,
        "Qwen3-30B-A3B": 30.5e9,
        "Qwen3-235B-A22B": 235.1e9,
        "Gemma-3-270m": 268e6,
        "Gemma-3-1B": 1.0e9,
        "Gemma-3-4B": 3.88e9,  # without the vision tower
    }
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    if config.num_experts:
        f = config.num_experts * config.moe_intermediate_size
    layer = h * heads * d + h * config.num_attention_heads * d + 3 * h * f + h * config.num_experts
    embeddings = config.vocab_size * h * (1 if config.tie_word_embeddings else 2)
    count = config.num_hidden_layers * layer + embeddings
    assert abs(count / published[name] - 1) < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported; use: silu, gelu_pytorch_tanh"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"hidden_size": "576"}, "hidden_size='576'; expected a positive integer"),
        ({"num_key_value_heads": 4}, "9 attention heads over 4 key heads"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor=None"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4}},
            "high_freq_factor=None",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias=true"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]},
            "linear_attention",
        ),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "'sliding_window'"),
        ({"model_type": "qwen3_moe"}, "lacks 'num_experts'"),
        ({**EXPERTS, "num_experts_per_tok": 9}, "num_experts_per_tok=9 of num_experts=8"),
        ({**EXPERTS, "mlp_only_layers": [2]}, r"mlp_only_layers=\[2\]; allowed: 0 to 1"),
        ({**EXPERTS, "hidden_act": "gelu_pytorch_tanh"}, "not supported of experts"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_a_config_asks_for_and_we_have_not_is_refused(
    change: Mapping[str, Any], message: str
) -> None:
    config = {**small_config(), **change}
    config = {k: v for k, v in config.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(config)


def test_nothing_is_read_before_the_check() -> None:
    config = CONFIGS["Qwen3-0.6B"]
    tensors = {n: FakeTensor((1,)) for _, group in entries(config) for n in group}
    with pytest.raises(ValueError, match="and .* more"):
        check_tensors(config, tensors, lambda path: (2,), "model")


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    stats: dict[str, int] | None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats

    def __str__(self) -> str:
        return "fake:0"


def test_model_too_large_for_the_device() -> None:
    gib = 1 << 30
    device = FakeDevice({"bytes_limit": 80 * gib, "bytes_in_use": 70 * gib})
    with pytest.raises(ValueError, match="take 16.00 GiB and fake:0 has 10.00 .* 6.00 GiB too"):
        check_memory("model", 16 * gib, device)
    check_memory("model", 10 * gib, device)
    for stats in (None, {}):  # a device that does not say
        check_memory("model", 10 * gib, FakeDevice(stats))


def test_memory_is_checked_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(source: str, needed: int, device: Any) -> None:
        seen.append(needed)
        raise ValueError("full")

    monkeypatch.setattr(jdet.models.load, "check_memory", spy)
    monkeypatch.setattr(jdet.models.load, "read_parameter", None)
    with pytest.raises(ValueError, match="full"):
        jdet.load(str(GOLDEN), dtype="float32")
    stored = safetensors.numpy.load_file(GOLDEN / "model.safetensors")
    tables = 2 * 512 * 16 * 4
    assert seen == [sum(t.nbytes for t in stored.values()) + tables]


def test_truncated_shard_is_recognised(tmp_path: Path) -> None:
    source = GOLDEN.parent / "tiny_llama3"
    for file in source.iterdir():
        shutil.copy(file, tmp_path)
    shard = tmp_path / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{shard.name}: damaged or truncated"):
        jdet.load(str(tmp_path))
    shard.unlink()
    with pytest.raises(ValueError, match=f"'{shard.name}' .* is missing"):
        jdet.load(str(tmp_path))


def test_config_and_weights_of_different_models(tmp_path: Path) -> None:
    """A config of other sizes, one with biases the file lacks, and one of another family."""
    shutil.copy(GOLDEN / "model.safetensors", tmp_path)
    config = json.loads((GOLDEN / "config.json").read_text())
    del config["layer_types"]
    for change, parts in (
        ({"num_hidden_layers": 3, "hidden_size": 128}, ("missing model.layers.2", "expected")),
        ({"attention_bias": True}, ("missing model.layers.0.self_attn.q_proj.bias", "k_proj.bias")),
        ({"model_type": "llama"}, ("unexpected model.layers.0.self_attn.q_norm.weight",)),
        ({"tie_word_embeddings": True, "num_hidden_layers": 1}, ("unexpected model.layers.1",)),
        ({"model_type": "gpt_bigcode"}, ("gpt_bigcode", "llama, mistral, qwen2, qwen3, qwen3_moe")),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError) as error:
            jdet.load(str(tmp_path))
        for part in (str(tmp_path), *parts):
            assert part in str(error.value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="Qwen3-8B"):
        jdet.random_model("Qwen3-9B")
    with pytest.raises(ValueError, match="float16"):
        jdet.random_model("Qwen3-8B", dtype="float16")
    with pytest.raises(NotImplementedError, match="portable"):
        jdet.load(str(GOLDEN), implementation="jax_triton")


def test_models_whose_hopper_kernels_no_card_has_run_are_portable_there():
    hopper = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    found = {name: default_for(config, "bfloat16", hopper) for name, config in CONFIGS.items()}
    unproven = {n for n in CONFIGS if n.startswith("Gemma-3") or n.endswith(("-A3B", "-A22B"))}
    assert {name for name, default in found.items() if default == "portable"} == unproven
    assert set(found.values()) == {"portable", "mosaic_gpu"}
