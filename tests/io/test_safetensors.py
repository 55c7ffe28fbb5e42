"""Hugging Face folders: one file and shards, bf16, laziness, and damage."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jdet.io.checkpoint import open_checkpoint
from jdet.io.errors import CheckpointError

BF16 = ml_dtypes.bfloat16


@pytest.fixture
def weights():
    rng = np.random.default_rng(5)
    return {
        "model.embed_tokens.weight": rng.standard_normal((10, 4), np.float32).astype(BF16),
        "model.norm.weight": rng.standard_normal(4, np.float32),
        "lm_head.weight": rng.standard_normal((10, 4), np.float32).astype(np.float16),
    }


@pytest.fixture
def folder(tmp_path, weights, write_json):
    write_json(tmp_path / "config.json", {"model_type": "llama", "rope_theta": 5e5})
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(folder, weights, write_json):
    (folder / "model.safetensors").unlink()
    placed = {}
    for index, (name, weight) in enumerate(weights.items()):
        placed[name] = f"model-{index + 1:05}-of-00003.safetensors"
        save_file({name: weight}, folder / placed[name])
    write_json(folder / "model.safetensors.index.json", {"weight_map": placed})
    return folder


def _check(checkpoint, weights):
    assert set(checkpoint.tensors) == set(weights)
    for name, expected in weights.items():
        source = checkpoint.tensors[name]
        assert source.shape == expected.shape
        for dtype in (np.float32, BF16, np.float16):
            read = source.read(dtype)
            assert read.dtype == dtype
            np.testing.assert_array_equal(read, expected.astype(dtype))


def test_one_file(folder, weights):
    checkpoint = open_checkpoint(folder)
    _check(checkpoint, weights)
    assert checkpoint.config["rope_theta"] == 5e5
    assert checkpoint.tokenizer is None
    assert checkpoint.source == str(folder)


def test_shards(sharded, weights):
    _check(open_checkpoint(sharded), weights)


def test_bf16_bits(folder):
    """Every bf16 pattern comes back as it is, read as bf16 or widened to float32."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    save_file({"w": bits.view(BF16)}, folder / "model.safetensors")
    source = open_checkpoint(folder).tensors["w"]
    np.testing.assert_array_equal(source.read(BF16).view(np.uint16), bits)
    finite = np.isfinite(bits.view(BF16).astype(np.float32))
    widened = source.read(np.float32).view(np.uint32)
    np.testing.assert_array_equal(widened[finite], bits[finite].astype(np.uint32) << 16)


def test_each_read_is_a_fresh_array(folder):
    source = open_checkpoint(folder).tensors["model.norm.weight"]
    first = source.read(np.float32)
    first[:] = 0
    assert source.read(np.float32).any()


def test_new_rope_spelling(folder, write_json):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    write_json(folder / "config.json", {"model_type": "llama", "rope_parameters": rope})
    config = open_checkpoint(folder).config
    assert config["rope_theta"] == 1e4
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}


def _refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message and message.count("\n") <= 1
    for word in words:
        assert word in message


@pytest.mark.parametrize("content", [None, "{", "[]", '{"vocab_size": 3}', b"\xff"])
def test_bad_config(folder, content):
    path = folder / "config.json"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    _refused(folder, "config.json" if content is None else str(path))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    _refused(folder, "no *.safetensors file")


def test_two_files_without_index(folder, weights):
    save_file(weights, folder / "extra.safetensors")
    _refused(folder, "2 *.safetensors files", "index")


def test_truncated_anywhere(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for end in [0, 4, 8, 20, 100, len(whole) - 40, len(whole) - 1]:
        path.write_bytes(whole[:end])
        _refused(folder, "damaged or truncated")


def test_flipped_header_bits(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(2)
    refused = 0
    for position in range(header):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            open_checkpoint(folder)
        except CheckpointError:
            refused += 1
    assert refused > header // 2


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    _refused(sharded, "model-00002-of-00003.safetensors", "missing")


def test_truncated_shard(sharded):
    path = sharded / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    _refused(sharded, path.name)


def test_index_names_a_tensor_no_shard_has(sharded, write_json):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.other.weight"] = "model-00001-of-00003.safetensors"
    write_json(index, content)
    _refused(sharded, "model.other.weight")


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_bad_index(sharded, write_json, content):
    write_json(sharded / "model.safetensors.index.json", content)
    _refused(sharded, "index")


def test_index_may_not_lead_out_of_the_folder(sharded, write_json):
    write_json(sharded / "model.safetensors.index.json", {"weight_map": {"a": "../a.safetensors"}})
    _refused(sharded, "../a.safetensors")


def test_unsupported_dtype(folder):
    save_file({"w": np.zeros(3, np.int8)}, folder / "model.safetensors")
    _refused(folder, "'w' is I8", "F32, F16, BF16")


def test_tiny_qwen3_golden(goldens):
    checkpoint = open_checkpoint(goldens / "tiny_qwen3")
    assert checkpoint.config["model_type"] == "qwen3"
    assert checkpoint.config["rope_theta"] == 50000.0
    assert checkpoint.tensors["model.layers.1.self_attn.q_norm.weight"].shape == (32,)
    assert checkpoint.tensors["lm_head.weight"].read(np.float32).shape == (160, 64)
