"""Models from GGUF files: configuration, lazily dequantised weights, tokenizer."""

import dataclasses
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from jdet.io.errors import CheckpointError
from jdet.io.gguf_config import read_config
from jdet.io.gguf_header import GGUFHeader, TensorInfo, read_header
from jdet.io.tokenizer import Tokenizer

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# A `{}` is an expert's number: such a tensor holds those of all.
_EXPERT_NAMES = {
    **{name: theirs for name, theirs in _LAYER_NAMES.items() if "mlp." not in theirs},
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
# Gemma has norms on both sides of the MLP, and Llama's name for the one before it after attention.
_GEMMA_NAMES = {
    **_LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BY_ARCHITECTURE = {"gemma3": _GEMMA_NAMES, "qwen3moe": _EXPERT_NAMES}
# Divisors of the rotary frequencies: how such files store Llama 3.1's scaled RoPE.
_ROPE_DIVISORS = "rope_freqs.weight"
_TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,5})\.)?(?P<part>\w+)\.(?P<leaf>weight|bias)")

_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Values converted at a time: small enough that the float32 stage stays in cache.
_CHUNK = 1 << 18


class GGUFTensor:
    """A tensor of a mapped GGUF file.

    Args:
        data: The mapped file.
        info: The tensor's place in it.
        rotary_heads: For a query or key projection of architecture ``llama``, its number
            of heads: such files store the rows of a head with the two halves of each
            rotated pair interleaved, and ``read`` puts them back. 0 otherwise.
        offset: What the file's values are more than Hugging Face's: 1 for the norms of
            architecture ``gemma3``, whose weights are stored less 1 there. Taken off in
            float32.
    """

    def __init__(
        self, data: mmap.mmap, info: TensorInfo, rotary_heads: int = 0, offset: int = 0
    ) -> None:
        self._data = data
        self._info = info
        self._rotary_heads = rotary_heads
        self._offset = offset
        self.shape = info.shape

    def read(self, dtype: npt.DTypeLike) -> np.ndarray:
        """Dequantises to float32 and casts to ``dtype``, a block of rows at a time."""
        from gguf import quants

        info = self._info
        raw = np.frombuffer(self._data, np.uint8, info.n_bytes, info.offset)
        plain = _PLAIN.get(info.kind.name)
        if plain is not None:
            out = raw.view(plain).reshape(self.shape)
            if self._offset:
                out = out.astype(np.float32) - np.float32(self._offset)
            out = out.astype(dtype)
        else:
            columns = self.shape[-1]
            rows = raw.reshape(-1, raw.size * columns // int(np.prod(self.shape)))
            out = np.empty((len(rows), columns), dtype)
            step = max(1, _CHUNK // columns)
            for start in range(0, len(rows), step):
                block = slice(start, start + step)
                out[block] = quants.dequantize(rows[block], info.kind)
            out = out.reshape(self.shape)
        if self._rotary_heads:
            heads = out.reshape(self._rotary_heads, -1, 2, *self.shape[1:])
            out = heads.swapaxes(1, 2).reshape(self.shape)
        return out


def read_gguf(path: Path) -> tuple[dict[str, Any], Mapping[str, GGUFTensor], Tokenizer | None]:
    """Opens a GGUF file of architecture ``llama``, ``qwen2``, ``qwen3``, ``qwen3moe``, ``gemma3``.

    Returns:
        A Hugging Face style configuration, the tensors under their Hugging Face names,
        and the tokenizer (None where the file has none).

    Raises:
        CheckpointError: Not a GGUF file; damaged or truncated; another architecture; a
            tensor, a quantisation or a tokenizer that this reader does not know.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path}: cannot be read as GGUF ({error})") from None
    header = read_header(data, path)
    config = read_config(header, path)
    _check_dequantisable(header, path)
    tensors = {}
    for info in header.tensors:
        if info.name == _ROPE_DIVISORS:
            _scale_rope(config, GGUFTensor(data, info).read(np.float64), path)
        else:
            name = _hf_name(info.name, header.metadata["general.architecture"], config, path)
            if "{}" in name:
                experts = _experts(info, config["num_experts"], path)
                tensors |= {name.format(e): GGUFTensor(data, i) for e, i in enumerate(experts)}
            else:
                tensors[name] = _tensor(data, info, name, config, path)
    return config, tensors, Tokenizer.from_gguf_metadata(header.metadata, str(path))


def _experts(info: TensorInfo, count: int, path: Path) -> list[TensorInfo]:
    """The matrices of the experts, which lie one behind the other."""
    if len(info.shape) != 3 or info.shape[0] != count:
        raise CheckpointError(
            f"{path}: tensor {info.name!r} of shape {info.shape} must hold {count} matrices"
        )
    size = info.n_bytes // count
    return [
        dataclasses.replace(info, shape=info.shape[1:], offset=info.offset + e * size, n_bytes=size)
        for e in range(count)
    ]


def _tensor(
    data: mmap.mmap, info: TensorInfo, name: str, config: dict[str, Any], path: Path
) -> GGUFTensor:
    heads, offset = 0, 0
    if config["model_type"] == "llama":
        if ".q_proj." in name:
            heads = config["num_attention_heads"]
        elif ".k_proj." in name:
            heads = config["num_key_value_heads"]
    elif config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        offset = 1
    if heads and info.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{path}: tensor {info.name!r} of shape {info.shape} cannot hold {heads} heads"
        )
    if offset and info.kind.name not in _PLAIN:
        raise CheckpointError(f"{path}: norm {info.name!r} is quantised as {info.kind.name}")
    return GGUFTensor(data, info, heads, offset)


def _scale_rope(config: dict[str, Any], divisors: np.ndarray, path: Path) -> None:
    """Enters the divisors of the frequencies into the configuration."""
    half = config["head_dim"] // 2
    if config["rope_scaling"] or divisors.shape != (half,) or not (divisors > 0).all():
        raise CheckpointError(
            f"{path}: tensor {_ROPE_DIVISORS!r} of shape {divisors.shape} must be {half} positive"
            " divisors of frequencies that are not scaled otherwise"
        )
    config["rope_scaling"] = {"rope_type": "divided", "divisors": divisors.tolist()}


def _hf_name(name: str, architecture: str, config: dict[str, Any], path: Path) -> str:
    match = _TENSOR_NAME.fullmatch(name)
    n_layers = config["num_hidden_layers"]
    layer_names = _BY_ARCHITECTURE.get(architecture, _LAYER_NAMES)
    if match:
        part, layer = match["part"], match["layer"]
        if layer is None and part in _NAMES:
            return f"{_NAMES[part]}.{match['leaf']}"
        if layer is not None and part in layer_names and int(layer) < n_layers:
            return f"model.layers.{int(layer)}.{layer_names[part]}.{match['leaf']}"
    raise CheckpointError(
        f"{path}: tensor {name!r} is not supported; supported are {architecture} decoders of"
        f" {n_layers} layers, with {', '.join(layer_names)}"
    )


def _check_dequantisable(header: GGUFHeader, path: Path) -> None:
    """Tries every quantisation of the file on one block of zeros."""
    from gguf import GGML_QUANT_SIZES, quants

    for kind in {info.kind for info in header.tensors if info.kind.name not in _PLAIN}:
        block = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            quants.dequantize(block, kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{path}: tensors of type {kind.name} cannot be dequantised by the gguf package"
            ) from None
