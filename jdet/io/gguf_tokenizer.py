"""The byte-level BPE tokenizer that a GGUF file's metadata describes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jdet.io.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

_PRE_TOKENIZERS = ("smollm", "gpt-2", "qwen2")
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # token types that are matched as a whole in a text


def byte_level_bpe(metadata: Mapping[str, Any], source: str) -> "tokenizers.Tokenizer":
    """Builds the tokenizer from ``tokenizer.ggml.*``; the result adds no BOS by itself.

    Raises:
        CheckpointError: A kind other than GPT-2 BPE with the pre-tokenizer smollm, gpt-2
            or qwen2, or damaged token tables.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers

    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{source}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            f"supported is 'gpt2' with {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, types, merges = _tables(metadata, source)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError(f"{source}: damaged token tables ({error})") from None
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    return backend


def token_ids(metadata: Mapping[str, Any], source: str) -> dict[str, int]:
    """Returns the ids of the tokens with a role (``bos``, ``eos``, ``eot``, ...) that are given.

    Raises:
        CheckpointError: One of them is no token's id.
    """
    size = len(metadata["tokenizer.ggml.tokens"])
    ids = {}
    for role in ("bos", "eos", "eot", "unknown", "padding"):
        value = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if value is None:
            continue
        if not isinstance(value, int) or not 0 <= value < size:
            raise CheckpointError(f"{source}: {role}_token_id {value!r} is not one of {size} ids")
        ids[role] = value
    return ids


def _pre_tokenizer(kind: str) -> "tokenizers.pre_tokenizers.PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen2")
    if kind == "gpt-2":
        return byte_level
    if kind == "smollm":
        split = pre_tokenizers.Digits(individual_digits=True)
    else:
        split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def _tables(
    metadata: Mapping[str, Any], source: str
) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """Returns tokens, their types and the merges, checked."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise CheckpointError(f"{source}: no tokenizer.ggml.tokens and .merges (lists of strings)")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{source}: a token occurs twice in tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise CheckpointError(f"{source}: tokenizer.ggml.token_type must have one entry per token")
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            raise CheckpointError(f"{source}: {merge!r} in tokenizer.ggml.merges is not a pair")
        pairs.append((left, right))
    return tokens, types.tolist(), pairs
