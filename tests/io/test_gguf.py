"""GGUF files: configuration, names, order of rows, dequantisation, and every kind of damage."""

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from gguf import GGMLQuantizationType as Kind

import jdet
import jdet.io.gguf
from jdet.io.checkpoint import open_checkpoint
from jdet.io.errors import CheckpointError

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3",
}  # to the family
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
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


def test_config_qwen2(write_gguf):
    checkpoint = open_checkpoint(write_gguf("qwen2").path)
    assert checkpoint.config["model_type"] == "qwen2" and checkpoint.config["attention_bias"]
    assert checkpoint.tensors["model.layers.1.self_attn.k_proj.bias"].shape == (32,)


def test_config_gemma3(write_gguf):
    def edit(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    config = open_checkpoint(write_gguf("gemma3", tied=True, edit=edit).path).config
    wanted = {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 32,
        "rope_theta": 75000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 20,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 32,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_gemma3_norms_are_stored_whole(write_gguf):
    """Like transformers' files, the reader gives weights less 1, taken off in float32."""
    written = write_gguf("gemma3", tied=True)
    name = "model.layers.0.post_feedforward_layernorm.weight"
    stored = gguf.GGUFReader(written.path)
    (whole,) = (t.data for t in stored.tensors if t.name == "blk.0.post_ffw_norm.weight")
    read = open_checkpoint(written.path).tensors[name].read(np.float32)
    np.testing.assert_array_equal(read, whole - np.float32(1))
    del whole, stored


def test_divided_rope(write_gguf):
    """Llama 3.1's scaled rope, as llama.cpp's converter stores it."""
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    written = write_gguf(edit=lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    checkpoint = open_checkpoint(written.path)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "divided",
        "divisors": divisors.astype(np.float64).tolist(),
    }
    assert set(checkpoint.tensors) == set(written.weights)
    for wrong in (divisors[:4], -divisors):
        written = write_gguf(edit=lambda w, wrong=wrong: w.add_tensor("rope_freqs.weight", wrong))
        _refused(written.path, "rope_freqs.weight", "8 positive divisors")


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


def test_yarn(write_gguf):
    def edit(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    config = open_checkpoint(write_gguf("qwen3moe", edit=edit).path).config
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert config["rope_scaling"] == scaling

    def more(writer):
        edit(writer)
        writer.add_rope_scaling_yarn_ext_factor(0.5)

    _refused(write_gguf(edit=more).path, "yarn_ext_factor", "not supported")


def test_config_qwen3moe(write_gguf):
    config = open_checkpoint(write_gguf("qwen3moe").path).config
    wanted = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_experts_of_k_quants(write_gguf):
    """What Q4_K_M files hold: each expert is a run of the stack's blocks."""
    rng = np.random.default_rng(4)
    for kind in (Kind.Q4_K, Kind.Q6_K):
        raw = rng.integers(0, 100, (6, 8, 2 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)

        def edit(writer, raw=raw, kind=kind):
            writer.add_tensor("blk.1.ffn_down_exps.bias", raw, raw_dtype=kind)

        tensors = open_checkpoint(write_gguf("qwen3moe", edit=edit).path).tensors
        for expert in range(6):
            source = tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.bias"]
            assert source.shape == (8, 512)
            wanted = gguf.quants.dequantize(raw[expert], kind)
            np.testing.assert_array_equal(source.read(np.float32), wanted)


@pytest.mark.parametrize("shape", [(5, 32, 64), (6, 64)])
def test_another_number_of_experts(write_gguf, shape):
    def edit(writer):
        writer.add_tensor("blk.0.ffn_up_exps.bias", np.ones(shape, np.float32))

    path = write_gguf("qwen3moe", edit=edit).path
    _refused(path, "blk.0.ffn_up_exps.bias", str(shape), "must hold 6 matrices")


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_is_that_of_a_folder(write_gguf, architecture, tmp_path, write_json):
    """The same parameters, shape and all, as from safetensors with the same configuration."""
    written = write_gguf(architecture, tied=architecture == "gemma3")
    write_json(tmp_path / "config.json", open_checkpoint(written.path).config)
    safetensors.numpy.save_file(written.weights, tmp_path / "model.safetensors")
    models = [jdet.load(str(path), dtype="float32") for path in (written.path, tmp_path)]
    assert models[0].config == models[1].config
    assert models[0].config.family == ARCHITECTURES[architecture]
    states = [jax.tree.leaves(nnx.state(model.decoder)) for model in models]
    for ours, theirs in zip(*states, strict=True):
        np.testing.assert_array_equal(ours, theirs)


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
        writer.kv_data[0]["general.architecture"].value = "gemma2"

    _refused(write_gguf(edit=edit).path, "'gemma2'", "llama, qwen2, qwen3, qwen3moe, gemma3")


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate_exps.weight", "blk.2.attn_q.weight", "cls.weight"]
)
def test_unknown_tensor(write_gguf, name):
    written = write_gguf(edit=lambda writer: writer.add_tensor(name, np.ones((4, 32), np.float32)))
    _refused(written.path, repr(name), "supported are llama decoders of 2 layers", "ffn_gate, ")


def test_unsupported_values(write_gguf):
    def add_i32(writer):
        writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.int32))

    _refused(write_gguf(edit=add_i32).path, "I32")
    _refused(write_gguf(edit=lambda writer: writer.add_rope_dimension_count(8)).path, "RoPE")
    _refused(write_gguf(edit=lambda writer: writer.add_value_length(8)).path, "unequal width")
    long = gguf.RopeScalingType.LONGROPE
    _refused(write_gguf(edit=lambda writer: writer.add_rope_scaling_type(long)).path, "'longrope'")


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
