"""GGUF files: configuration, names, order of rows, dequantisation, and every kind of damage."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import jdet.io.gguf
from jdet.io.checkpoint import open_checkpoint
from jdet.io.errors import CheckpointError

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_weights(write_gguf, architecture, kind, monkeypatch):
    # Smaller than a tensor, and no multiple of its rows: blocks must join seamlessly.
    monkeypatch.setattr(jdet.io.gguf, "_CHUNK", 7 * 64)
    written = write_gguf(architecture, kind)
    tensors = open_checkpoint(written.path).tensors
    assert set(tensors) == set(written.weights)
    for name, expected in written.weights.items():
        source = tensors[name]
        assert source.shape == expected.shape
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
            weight = source.read(dtype)
            assert weight.dtype == dtype and weight.flags.writeable
            np.testing.assert_array_equal(weight, expected.astype(dtype), err_msg=name)


def test_config_llama(write_gguf):
    config = open_checkpoint(write_gguf("llama", tied=True).path).config
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 263,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 75000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 0,
    }


def test_config_qwen3(write_gguf):
    checkpoint = open_checkpoint(write_gguf("qwen3").path)
    assert checkpoint.config["head_dim"] == 32
    assert checkpoint.config["architectures"] == ["Qwen3ForCausalLM"]
    assert not checkpoint.config["tie_word_embeddings"]
    assert "lm_head.weight" in checkpoint.tensors


def test_bias_rows_are_reordered_too(write_gguf):
    bias = np.arange(64, dtype=np.float32)
    stored = bias.reshape(4, 2, 8).swapaxes(1, 2).ravel()
    written = write_gguf(edit=lambda writer: writer.add_tensor("blk.0.attn_q.bias", stored))
    checkpoint = open_checkpoint(written.path)
    assert checkpoint.config["attention_bias"]
    read = checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"].read(np.float32)
    np.testing.assert_array_equal(read, bias)


def test_linear_rope_scaling(write_gguf):
    def edit(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    config = open_checkpoint(write_gguf(edit=edit).path).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_nothing_is_dequantised_before_read(write_gguf, monkeypatch):
    written = write_gguf(kind=Kind.Q4_0)
    sizes = []
    original = gguf.quants.dequantize

    def spy(data, kind):
        sizes.append(data.size)
        return original(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", spy)
    checkpoint = open_checkpoint(written.path)
    assert sizes == [18]  # one block of zeros: can the package read this type?
    checkpoint.tensors["model.embed_tokens.weight"].read(np.float32)
    assert sum(sizes[1:]) == 263 * 64 // 32 * 18


def test_k_quants(write_gguf):
    # The package cannot write these, so the bytes are random; only finite values compare.
    shape = (96, 256)
    rng = np.random.default_rng(3)
    for kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        raw = rng.integers(0, 100, (shape[0], block_bytes), np.uint8)

        def edit(writer, raw=raw, kind=kind):
            writer.add_tensor("blk.1.ffn_gate.bias", raw, raw_dtype=kind)

        source = open_checkpoint(write_gguf(edit=edit).path).tensors[
            "model.layers.1.mlp.gate_proj.bias"
        ]
        assert source.shape == shape
        np.testing.assert_array_equal(source.read(np.float32), gguf.quants.dequantize(raw, kind))


def _refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and message.count("\n") <= 1
    for word in words:
        assert word in message


def test_not_a_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    _refused(path, "no such file")
    path.write_bytes(b"")
    _refused(path)
    path.write_bytes(b"PK\x03\x04 something else")
    _refused(path, "not a GGUF")
    other = tmp_path / "model.bin"
    other.write_bytes(b"GGUF")
    _refused(other, "not a checkpoint", ".gguf", "config.json")


def test_truncated_anywhere(write_gguf):
    path = write_gguf(kind=Kind.Q4_1).path
    whole = path.read_bytes()
    data_start = gguf.GGUFReader(path).data_offset
    ends = [1, 3, 4, 7, 8, 15, 23, 24, 31, *range(40, data_start, 97), data_start]
    for end in [*ends, len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:end])
        _refused(path)


def test_flipped_bits_never_surprise(write_gguf):
    """A damaged header is refused, or read where the flip hit a harmless value; no third way."""
    path = write_gguf(kind=Kind.Q4_1).path
    whole = path.read_bytes()
    reader = gguf.GGUFReader(path)
    rng = np.random.default_rng(11)
    counts = np.arange(24)  # magic, version, counts
    tables = rng.integers(0, reader.data_offset, 100)
    entries = rng.integers(reader.tensors[0].field.offset, reader.data_offset, 100)
    del reader
    refused = 0
    for position in np.concatenate([counts, tables, entries]):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 90


def test_other_byte_order(write_gguf):
    _refused(write_gguf(endianess=gguf.GGUFEndian.BIG).path, "little-endian")


def test_other_architecture(write_gguf):
    def edit(writer):
        writer.kv_data[0]["general.architecture"].value = "gemma3"

    _refused(write_gguf(edit=edit).path, "'gemma3'", "llama, qwen3")


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.ffn_gate_exps.weight", "blk.2.attn_q.weight", "cls.weight"]
)
def test_unknown_tensor(write_gguf, name):
    written = write_gguf(edit=lambda writer: writer.add_tensor(name, np.ones((4, 32), np.float32)))
    _refused(written.path, repr(name), "supported are dense llama and qwen3")


def test_unsupported_values(write_gguf):
    def add_i32(writer):
        writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.int32))

    _refused(write_gguf(edit=add_i32).path, "I32")
    _refused(write_gguf(edit=lambda writer: writer.add_rope_dimension_count(8)).path, "RoPE")
    _refused(write_gguf(edit=lambda writer: writer.add_value_length(8)).path, "unequal width")
    yarn = gguf.RopeScalingType.YARN
    _refused(write_gguf(edit=lambda writer: writer.add_rope_scaling_type(yarn)).path, "'yarn'")


def test_missing_metadata(write_gguf):
    def edit(writer):
        del writer.kv_data[0]["llama.feed_forward_length"]

    _refused(write_gguf(edit=edit).path, "llama.feed_forward_length", "None")


def test_smollm2(smollm2_path):
    checkpoint = open_checkpoint(smollm2_path)
    config = checkpoint.config
    assert (config["model_type"], config["num_hidden_layers"], config["head_dim"]) == (
        "llama",
        30,
        64,
    )
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert (config["rope_theta"], config["rms_norm_eps"]) == (1e5, 1e-5)
    assert config["tie_word_embeddings"] and config["vocab_size"] == 49152
    assert len(checkpoint.tensors) == 272
    weight = checkpoint.tensors["model.layers.29.mlp.down_proj.weight"].read(ml_dtypes.bfloat16)
    assert weight.shape == (576, 1536) and np.isfinite(weight.astype(np.float32)).all()
