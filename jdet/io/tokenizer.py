"""Text to token ids and back, with the tokenizer and chat template of the model's own files."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdet.io.chat_template import ChatTemplate
from jdet.io.errors import CheckpointError
from jdet.io.gguf_tokenizer import adds_bos, read_tokenizer, token_ids

if TYPE_CHECKING:
    import tokenizers

# End-of-turn markers of the supported families: they stop a reply also where the file
# names another token as its EOS.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A model's tokenizer.

    Made by ``from_gguf_metadata`` and ``from_folder``.

    Attributes:
        eos_token_ids: The ids that end a reply: EOS and end-of-turn, ascending.
        vocab_size: Number of tokens, special ones included. A model's embedding may
            have more rows.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        bos_to_add: int | None,
        eos_token_ids: Sequence[int],
        chat_template: ChatTemplate | None,
        source: str,
    ) -> None:
        self._backend = backend
        self._bos_to_add = bos_to_add
        self._chat_template = chat_template
        self._source = source
        markers = (backend.token_to_id(marker) for marker in _END_OF_TURN)
        ends = {*eos_token_ids, *(marker for marker in markers if marker is not None)}
        self.eos_token_ids = tuple(sorted(ends))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any], source: str) -> "Tokenizer | None":
        """Builds the tokenizer that a GGUF file's metadata describes.

        Args:
            metadata: ``GGUFHeader.metadata``.
            source: The file's name, for messages.

        Returns:
            The tokenizer; None where the file has none.

        Raises:
            CheckpointError: A kind other than GPT-2 BPE with one of the known
                pre-tokenizers or SentencePiece's BPE, or damaged token tables.
        """
        if "tokenizer.ggml.model" not in metadata:
            return None
        backend = read_tokenizer(metadata, source)
        ids = token_ids(metadata, source)
        names = {"unknown": "unk_token", "padding": "pad_token"}
        special = {
            names.get(name, f"{name}_token"): metadata["tokenizer.ggml.tokens"][token]
            for name, token in ids.items()
        }
        template = metadata.get("tokenizer.chat_template")
        return cls(
            backend,
            bos_to_add=ids.get("bos") if adds_bos(metadata) else None,
            eos_token_ids=[ids[name] for name in ("eos", "eot") if name in ids],
            chat_template=ChatTemplate(template, special, source) if template else None,
            source=source,
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads ``tokenizer.json`` and, where they are, the files that go with it.

        Those are ``tokenizer_config.json``, ``chat_template.jinja`` and
        ``generation_config.json``.

        Raises:
            CheckpointError: ``tokenizer.json`` is missing, or a file is damaged.
        """
        import tokenizers

        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{path}: no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            raise CheckpointError(f"{file}: damaged or of an unknown kind ({error})") from None
        # Either setting would cut or lengthen a prompt without a word.
        backend.no_truncation()
        backend.no_padding()

        config = _read_json(path / "tokenizer_config.json")
        special = {}
        for name, value in config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                special[name] = text
        ends = _read_json(path / "generation_config.json").get("eos_token_id")
        if ends is None and "eos_token" in special:
            ends = backend.token_to_id(special["eos_token"])
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(isinstance(end, int) for end in ends):
            raise CheckpointError(f"{path}: eos_token_id must be ids, found {ends!r}")
        template = _folder_template(path, config)
        # What the file's own post-processor puts before a text.
        probe = backend.encode("a", add_special_tokens=True)
        adds_bos = bool(probe.special_tokens_mask[:1] == [1])
        return cls(
            backend,
            bos_to_add=probe.ids[0] if adds_bos else None,
            eos_token_ids=ends,
            chat_template=ChatTemplate(template, special, str(path)) if template else None,
            source=str(path),
        )

    def save(self, folder: Path) -> None:
        """Writes the files that ``from_folder`` reads, and transformers does."""
        import tokenizers
        from tokenizers import processors

        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        if self._bos_to_add is not None:
            bos = backend.id_to_token(self._bos_to_add)
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"],
                pair=[bos, "$A", bos, "$B"],
                special_tokens=[(bos, self._bos_to_add)],
            )
        backend.save(str(folder / "tokenizer.json"))
        template = self._chat_template
        _write_json(folder / "tokenizer_config.json", template.tokens if template else {})
        _write_json(folder / "generation_config.json", {"eos_token_id": list(self.eos_token_ids)})
        if template:
            (folder / "chat_template.jinja").write_text(template.text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of ``text``; special tokens written out in it are recognised.

        BOS is put before them where the file asks for it and the text (a rendered chat
        prompt, say) does not begin with it already.

        Raises:
            UnicodeEncodeError: ``text`` holds half of a surrogate pair, as JSON may.
        """
        text.encode()  # the backend's own error is a TypeError that says something else
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self._bos_to_add is not None and ids[:1] != [self._bos_to_add]:
            ids.insert(0, self._bos_to_add)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream_decoder(self, skip_special: bool = True) -> "StreamDecoder":
        """Returns a decoder for the ids of one sequence, one at a time."""
        return StreamDecoder(self._backend, skip_special)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat_prompt`` can be used."""
        return self._chat_template is not None

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Renders messages (``{"role": ..., "content": ...}``) with the model's chat template.

        Args:
            messages: With the roles that the template has: ``system``, ``user``, ``assistant``
                (with ``tool_calls``), ``tool``.
            add_generation_prompt: Whether the assistant's turn is begun at the end.
            tools: The functions that the model may call, as OpenAI's API has them.
            variables: What else the template knows: ``enable_thinking=False`` (Qwen3).

        Raises:
            CheckpointError: The model has no chat template; it refuses the messages; it does
                not look at tools, or at a variable.
        """
        if self._chat_template is None:
            raise CheckpointError(f"{self._source}: no chat template; give the prompt as raw text")
        return self._chat_template.render(messages, add_generation_prompt, tools, variables)


class StreamDecoder:
    """Decodes the ids of one sequence as they come; see ``Tokenizer.stream_decoder``.

    The pieces that ``push`` and ``finish`` return, joined, equal ``Tokenizer.decode`` of
    all ids.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", skip_special: bool) -> None:
        self._backend = backend
        self._skip_special = skip_special
        added = backend.get_added_tokens_decoder() if skip_special else {}
        self._skipped = {token_id for token_id, token in added.items() if token.special}
        # The ids since the last place where the text was complete, with the step before
        # it: some tokenizers drop the space that begins a sequence, so decoding needs what
        # stood before. The first `_shown` characters of their text are already given out.
        self._window: list[int] = []
        self._start = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that it completed, often ``""``."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        if _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or ""):
            return ""  # SentencePiece decodes a run of byte tokens as a whole
        text = self._decode(self._window)
        if text.endswith(_UNKNOWN_CHARACTER):
            # Perhaps the first bytes of a character. Those before it are settled.
            return self._show(text[:-1])
        new = self._show(text)
        if new:
            self._window = self._window[self._start :]
            self._start = len(self._window)
            self._shown = len(self._decode(self._window))
        return new

    def finish(self) -> str:
        """Returns what was held back."""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=self._skip_special)


def _read_json(path: Path) -> dict[str, Any]:
    """Reads an optional JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _folder_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
