"""Tokenizers from GGUF metadata and from folders, against transformers where it matters."""

import json
import random
import re

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from jdet.io.chat_template import ChatTemplate
from jdet.io.checkpoint import open_checkpoint
from jdet.io.errors import CheckpointError
from jdet.io.tokenizer import Tokenizer


def _tokenizer(path) -> Tokenizer:
    tokenizer = open_checkpoint(path).tokenizer
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return _tokenizer(smollm2_path)


@pytest.fixture(scope="session")
def golden(goldens):
    return json.loads((goldens / "smollm2_tokens.json").read_text(encoding="utf-8"))


def test_smollm2_ids(smollm2, golden):
    assert smollm2.vocab_size == golden["vocab_size"]
    assert smollm2.eos_token_ids == (2,)
    for entry in golden["strings"]:
        assert smollm2.encode(entry["text"]) == entry["ids"], entry["text"]
        assert smollm2.decode(entry["ids"], skip_special=False) == entry["decoded"]


def test_smollm2_chat(smollm2, golden):
    for entry in golden["chats"]:
        prompt = smollm2.chat_prompt(entry["messages"], entry["add_generation_prompt"])
        assert prompt == entry["prompt"]


def _stream(tokenizer, ids, skip_special=True):
    decoder = tokenizer.stream_decoder(skip_special)
    pieces = [decoder.push(token_id) for token_id in ids]
    return pieces, decoder.finish()


def test_stream_of_text(smollm2, golden):
    for entry in golden["strings"]:
        pieces, rest = _stream(smollm2, entry["ids"])
        assert "".join(pieces) + rest == smollm2.decode(entry["ids"])
        # All text is whole characters, so nothing broken may ever show.
        assert not any("\ufffd" in piece for piece in pieces) and rest == ""


@pytest.mark.parametrize("skip_special", [True, False])
def test_stream_of_noise(smollm2, skip_special):
    """Random ids, mostly single bytes: broken UTF-8 of every kind."""
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(300 if rng.random() < 0.8 else 49152) for _ in range(30)]
        pieces, rest = _stream(smollm2, ids, skip_special)
        assert "".join(pieces) + rest == smollm2.decode(ids, skip_special)


def test_stream_is_prompt(smollm2):
    ids = smollm2.encode("Plain words come out at once.")
    pieces, rest = _stream(smollm2, ids)
    assert all(pieces) and rest == ""


def test_half_of_a_surrogate_pair_is_refused(smollm2):
    """JSON may hold one; in a batch it must be the error of its line."""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        smollm2.encode("a\ud800")


def test_gguf(write_gguf, token_tables):
    tokenizer = _tokenizer(write_gguf().path)
    tables = {token: index for index, token in enumerate(token_tables.tokens)}
    assert tokenizer.vocab_size == 263
    # EOS, and the end-of-turn marker that the file does not name.
    assert tokenizer.eos_token_ids == (0, 2)
    # Digits stand alone although a merge exists; specials and user-defined tokens are whole.
    expected = ["he", "Ġhe", "1", "2", "<|im_end|>", "<think>"]
    assert tokenizer.encode("he he12<|im_end|><think>") == [tables[token] for token in expected]
    ids = tokenizer.encode("a<|im_end|><think>")
    assert tokenizer.decode(ids) == "a<think>"
    assert tokenizer.decode(ids, skip_special=False) == "a<|im_end|><think>"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "Ġ", "1", "2", "!", "Ċ"]),
        ("gpt-2", ["12", "Ġ", "12", "!", "Ċ"]),
        ("qwen2", ["1", "2", "Ġ", "1", "2", "!", "Ċ"]),
        # BOS too: so llama.cpp where the file does not say.
        ("llama-bpe", ["<|im_start|>", "12", "Ġ", "12", "!", "Ċ"]),
    ],
)
def test_pre_tokenizers(write_gguf, token_tables, pre, pieces):
    tokenizer = _tokenizer(write_gguf(pre=pre).path)
    assert [token_tables.tokens[index] for index in tokenizer.encode("12 12!\n")] == pieces


def _sentencepiece(golden):
    return Tokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": golden["tokens"],
            "tokenizer.ggml.scores": np.array(golden["scores"], np.float32),
            "tokenizer.ggml.token_type": np.array(golden["types"], np.int32),
            "tokenizer.ggml.add_space_prefix": golden["add_space_prefix"],
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        },
        "golden",
    )


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_sentencepiece_ids_and_texts(goldens, kind):
    """Those of the sentencepiece package (scripts/goldens/make_sentencepiece.py), after BOS."""
    golden = json.loads((goldens / "sentencepiece.json").read_text(encoding="utf-8"))[kind]
    tokenizer = _sentencepiece(golden)
    assert tokenizer is not None and len(golden["strings"]) > 20
    for entry in golden["strings"]:
        ids = tokenizer.encode(entry["text"])
        assert ids == [1, *entry["ids"]], entry["text"]
        assert tokenizer.decode(entry["ids"]) == entry["decoded"]
        pieces, rest = _stream(tokenizer, ids)
        assert "".join(pieces) + rest == entry["decoded"]


def test_qwen2_composes_accents(write_gguf):
    tokenizer = _tokenizer(write_gguf(pre="qwen2").path)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_gguf_bos_only_where_asked(write_gguf):
    assert _tokenizer(write_gguf().path).encode("a")[0] != 1
    path = write_gguf(edit=lambda writer: writer.add_add_bos_token(True)).path
    tokenizer = _tokenizer(path)
    assert tokenizer.encode("a")[0] == 1 and tokenizer.encode("") == [1]
    # A rendered chat begins with it already.
    assert tokenizer.encode("<|im_start|>a").count(1) == 1


def test_gguf_without_tokenizer(write_gguf):
    def edit(writer):
        for key in [key for key in writer.kv_data[0] if key.startswith("tokenizer.")]:
            del writer.kv_data[0][key]

    assert open_checkpoint(write_gguf(edit=edit).path).tokenizer is None


def test_gguf_refusals(write_gguf, token_tables):
    def refused(match, **options):
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(write_gguf(**options).path)

    def kind(name):
        return lambda writer: _set(writer, "tokenizer.ggml.model", name)

    refused("'t5' with .* 'smollm'.*'llama', and 'gpt2' with smollm, gpt-2", edit=kind("t5"))
    refused("tokenizer.ggml.scores must have one entry", edit=kind("llama"))
    refused("'tekken'", pre="tekken")
    refused("bos_token_id 263", edit=lambda w: _set(w, "tokenizer.ggml.bos_token_id", 263))
    for table, value, match in (
        ("merges", ["h e", "he"], "not a pair"),
        ("merges", ["h nothere"], "damaged token tables"),
        ("tokens", ["same"] * 263, "occurs twice"),
    ):
        damaged = type(token_tables)(**{table: value})
        refused(match, tokens=damaged)


def _set(writer, key, value):
    writer.kv_data[0][key].value = value


def test_chat_template(write_gguf):
    tokenizer = _tokenizer(write_gguf().path)
    user = {"role": "user", "content": "hé"}
    assert tokenizer.has_chat_template
    # trim_blocks and lstrip_blocks: the template's own line breaks leave no trace.
    turn = "<|im_start|>user\nhé<|im_end|>\n"
    assert tokenizer.chat_prompt([user], add_generation_prompt=False) == turn
    assert tokenizer.chat_prompt([user]) == turn + "<|im_start|>assistant\n"
    with pytest.raises(CheckpointError, match="no wizards"):
        tokenizer.chat_prompt([{"role": "wizard", "content": ""}])
    with pytest.raises(CheckpointError, match="chat template"):
        tokenizer.chat_prompt([{"role": "user"}])


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
def test_chats_are_those_of_transformers(goldens, name):
    """Tools, tool calls and answers, system messages, variables; refusals (make_chats.py)."""
    golden = json.loads((goldens / "chats.json").read_text(encoding="utf-8"))
    template = ChatTemplate(golden["templates"][name], golden["tokens"], "here")
    cases = [case for case in golden["cases"] if case["template"] == name]
    assert len(cases) >= 16 and any("prompt" in case for case in cases)
    for case in cases:
        arguments = (
            golden["conversations"][case["conversation"]],
            case["add_generation_prompt"],
            golden["tools"] if case["tools"] else None,
            case["variables"],
        )
        if "error" in case:
            with pytest.raises(CheckpointError, match=re.escape(case["error"])):
                template.render(*arguments)
        else:
            assert template.render(*arguments) == case["prompt"], case


def test_what_a_template_does_not_look_at_is_refused(write_gguf):
    tokenizer = _tokenizer(write_gguf().path)
    user = [{"role": "user", "content": "hi"}]
    with pytest.raises(CheckpointError, match="no use for tools; it may be given nothing"):
        tokenizer.chat_prompt(user, tools=[])
    with pytest.raises(CheckpointError, match="no use for enable_thinking"):
        tokenizer.chat_prompt(user, enable_thinking=False)
    text = "{{ tools }}{% if enable_thinking is defined %}!{% endif %}{{ bos_token }}"
    path = write_gguf(edit=lambda w: _set(w, "tokenizer.chat_template", text)).path
    thinking = _tokenizer(path)
    assert thinking.chat_prompt(user, tools=[{"a": 1}], enable_thinking=True).startswith(
        "[{'a': 1}]!"
    )
    with pytest.raises(CheckpointError, match="for thinking; it may be given enable_th.*, tools$"):
        thinking.chat_prompt(user, thinking=True)


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ messages.__class__.__mro__ }}", "{{ 1 / 0 }}"]
)
def test_hostile_or_broken_template(write_gguf, template):
    path = write_gguf(edit=lambda w: _set(w, "tokenizer.chat_template", template)).path
    with pytest.raises(CheckpointError, match="chat template"):
        _tokenizer(path).chat_prompt([{"role": "user", "content": "hi"}])


@pytest.fixture
def folder(tmp_path, token_tables, write_json):
    """A folder as Llama 3 has it: BOS by the post-processor, several EOS ids."""
    vocabulary = {token: index for index, token in enumerate(token_tables.tokens)}
    merges = [tuple(merge.split()) for merge in token_tables.merges]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token) for token in token_tables.tokens[:3]])
    bos = token_tables.tokens[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 0)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"content": bos},
        "eos_token": "<|im_start|>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% endfor %}",
    }
    write_json(tmp_path / "tokenizer_config.json", config)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, 258]})
    return tmp_path


def test_folder(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == (1, 2, 258)
    assert tokenizer.vocab_size == 263
    ids = tokenizer.encode("hello world")
    assert ids[0] == 0 and len(ids) == 1 + 10  # neither truncated nor padded
    assert tokenizer.decode(ids) == "hello world"
    prompt = tokenizer.chat_prompt([{"role": "user", "content": "<é>"}])
    assert prompt == '<|endoftext|>{"role": "user", "content": "<é>"}'
    assert tokenizer.encode(prompt).count(0) == 1


def _assert_same(tokenizer, other, texts):
    assert tokenizer.vocab_size == other.vocab_size
    assert tokenizer.eos_token_ids == other.eos_token_ids
    assert tokenizer.has_chat_template == other.has_chat_template
    for text in texts:
        ids = other.encode(text)
        assert tokenizer.encode(text) == ids, text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == other.decode(ids, skip), text


def _saved(tokenizer, folder):
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    return Tokenizer.from_folder(folder)


def test_saved_smollm2(smollm2, golden, tmp_path):
    saved = _saved(smollm2, tmp_path)
    _assert_same(saved, smollm2, [entry["text"] for entry in golden["strings"]])
    for entry in golden["chats"]:
        assert (
            saved.chat_prompt(entry["messages"], entry["add_generation_prompt"])
            == (entry["prompt"])
        )


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_saved_sentencepiece(goldens, kind, tmp_path):
    """BOS by a post-processor in the file, which the GGUF's has not."""
    golden = json.loads((goldens / "sentencepiece.json").read_text(encoding="utf-8"))[kind]
    tokenizer = _sentencepiece(golden)
    texts = [entry["text"] for entry in golden["strings"]]
    _assert_same(_saved(tokenizer, tmp_path), tokenizer, texts)


def test_saved_folder(folder, tmp_path):
    tokenizer = Tokenizer.from_folder(folder)
    saved = _saved(tokenizer, tmp_path / "saved")
    _assert_same(saved, tokenizer, ["hello world", "", "<|im_start|>he"])
    messages = [{"role": "user", "content": "<é>"}]
    assert saved.chat_prompt(messages) == tokenizer.chat_prompt(messages)


def test_folder_without_the_other_files(folder):
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == (2,)
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match="no chat template"):
        tokenizer.chat_prompt([])


def test_folder_eos_from_tokenizer_config(folder, write_json):
    write_json(folder / "generation_config.json", {})
    assert Tokenizer.from_folder(folder).eos_token_ids == (1, 2)


def test_folder_templates(folder, write_json):
    named = [{"name": "tool", "template": "tool"}, {"name": "default", "template": "default"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert Tokenizer.from_folder(folder).chat_prompt([]) == "default"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(folder).chat_prompt([]) == "file"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
    ],
)
def test_damaged_folder(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=str(folder)):
        Tokenizer.from_folder(folder)


def test_stream_of_sentencepiece_bytes(tmp_path):
    """A byte-fallback tokenizer strips the first space and decodes byte runs as a whole."""
    data = "自".encode()
    byte_tokens = [f"<0x{byte:02X}>" for byte in data]
    tokens = ["<s>", "▁", "▁hi", *byte_tokens]
    backend = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True)
    )
    backend.add_special_tokens([AddedToken("<s>")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    pieces, rest = _stream(tokenizer, [0, 2, 1, 2, 3, 4, 5, 2])
    assert pieces == ["", "hi", " ", " hi", "", "", "", "自 hi"] and rest == ""
    rng = random.Random(4)
    for _ in range(300):
        ids = [rng.randrange(len(tokens)) for _ in range(12)]
        pieces, rest = _stream(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)
