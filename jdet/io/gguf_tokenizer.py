"""The tokenizer that a GGUF file's metadata describes: byte-level BPE, or SentencePiece's BPE."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jdet.io.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

_PRE_TOKENIZERS = ("smollm", "gpt-2", "qwen2", "llama-bpe")
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's and Qwen2's differ in how many digits stand together.
_SPLITS = {
    "qwen2": _SPLIT.format(digits=r"\p{N}"),
    "llama-bpe": _SPLIT.format(digits=r"\p{N}{1,3}"),
}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
_CONTROL, _USER_DEFINED = 3, 4  # token types that are matched as a whole in a text


def read_tokenizer(metadata: Mapping[str, Any], source: str) -> "tokenizers.Tokenizer":
    """Builds the tokenizer from ``tokenizer.ggml.*``; the result adds no BOS by itself.

    Raises:
        CheckpointError: A kind other than GPT-2 BPE with one of the known pre-tokenizers
            or SentencePiece's BPE (``llama``), or damaged token tables.
    """
    from tokenizers import AddedToken

    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "llama" and (kind != "gpt2" or pre not in _PRE_TOKENIZERS):
        raise CheckpointError(
            f"{source}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            f"supported are 'llama', and 'gpt2' with {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, types = _tokens(metadata, source)
    try:
        if kind == "llama":
            backend = _sentencepiece_bpe(tokens, metadata, source)
        else:
            backend = _byte_level_bpe(tokens, _merges(metadata, source), pre)
    except CheckpointError:
        raise
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError(f"{source}: damaged token tables ({error})") from None
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    return backend


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether BOS stands before a text; where the file does not say, llama.cpp's rule."""
    kinds = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    default = kinds[0] == "llama" or kinds[1] == "llama-bpe"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level_bpe(
    tokens: list[str], merges: list[tuple[str, str]], pre: str
) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it is, whether or not merges lead to it.
    whole_words = pre == "llama-bpe"
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    tokens: list[str], metadata: Mapping[str, Any], source: str
) -> "tokenizers.Tokenizer":
    """Pairs are joined in the order of their scores; unknown characters become bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise CheckpointError(f"{source}: tokenizer.ggml.scores must have one entry per token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    # Best first; a stable sort, so that of equal scores the lower id comes first.
    order = np.argsort(-scores, kind="stable").tolist()
    merges = [
        (token[:cut], token[cut:])
        for token in (tokens[i] for i in order)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    bpe = models.BPE(
        vocabulary,
        merges,
        unk_token=tokens[unknown] if isinstance(unknown, int) and unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
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

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in _SPLITS)
    if kind == "gpt-2":
        return byte_level
    if kind == "smollm":
        split = pre_tokenizers.Digits(individual_digits=True)
    else:
        split = pre_tokenizers.Split(Regex(_SPLITS[kind]), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def _tokens(metadata: Mapping[str, Any], source: str) -> tuple[list[str], list[int]]:
    """Returns tokens and their types, checked."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise CheckpointError(f"{source}: no tokenizer.ggml.tokens (a list of strings)")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{source}: a token occurs twice in tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise CheckpointError(f"{source}: tokenizer.ggml.token_type must have one entry per token")
    return tokens, types.tolist()


def _merges(metadata: Mapping[str, Any], source: str) -> list[tuple[str, str]]:
    """Returns the merges, checked."""
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{source}: no tokenizer.ggml.merges (a list of strings)")
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            raise CheckpointError(f"{source}: {merge!r} in tokenizer.ggml.merges is not a pair")
        pairs.append((left, right))
    return pairs
