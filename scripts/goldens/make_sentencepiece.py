"""Makes tests/goldens/sentencepiece.json with sentencepiece.

Two small BPE vocabularies, trained as Llama's (a space put before a text) and as Gemma's (none,
runs of spaces and line breaks are user-defined tokens), in the form in which GGUF files hold
them, and the ids of some strings. Nothing of jdet is imported. See README.md beside this file.

    python scripts/goldens/make_sentencepiece.py
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
from make_smollm2 import LONG, STRINGS

RUNS = ["\u2581" * n for n in (2, 3, 4)] + ["\n\n", "\t\t"]
TYPES = {"is_unknown": 2, "is_control": 3, "is_byte": 6}


def make(add_prefix: bool, user_defined: list[str]) -> dict:
    """Trains one and returns its tables and the ids of the strings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            LONG.splitlines() + ["def f(x): return x  # 12 345", "naïve façade"]
        ),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_prefix,
        user_defined_symbols=user_defined,
        num_threads=1,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.get_piece_size()
    types = [
        next((code for name, code in TYPES.items() if getattr(processor, name)(i)), 1)
        for i in range(size)
    ]
    pieces = [processor.id_to_piece(i) for i in range(size)]
    for symbol in user_defined:
        index = processor.piece_to_id(symbol)
        types[index] = 4
        # llama.cpp's converter writes them as they stand in a text.
        pieces[index] = symbol.replace("\u2581", " ")
    # Control tokens written out in a text are recognised by llama.cpp, not by sentencepiece.
    strings = [s for s in [*STRINGS, LONG, "a  b   c\n\nd\t\te"] if "<s>" not in s]
    return {
        "tokens": pieces,
        "scores": [processor.get_score(i) for i in range(size)],
        "types": types,
        "add_space_prefix": add_prefix,
        "strings": [
            {
                "text": s,
                "ids": processor.encode(s),
                "decoded": processor.decode(processor.encode(s)),
            }
            for s in strings
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "tests" / "goldens"
    )
    golden = {
        "made_with": {"sentencepiece": sentencepiece.__version__},
        "llama": make(True, []),
        "gemma": make(False, RUNS),
    }
    out = parser.parse_args().out / "sentencepiece.json"
    out.write_text(json.dumps(golden, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
