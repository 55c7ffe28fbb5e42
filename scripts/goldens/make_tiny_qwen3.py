"""Makes tests/goldens/tiny_qwen3/ and tiny_qwen3_logits.npz with transformers.

A Qwen3 of two small layers with random weights (the norms' too, so that a forgotten or
exchanged norm shows) as a Hugging Face folder, and its float32 logits. Nothing of jdet is
imported. See README.md beside this file for the environment.

    python scripts/goldens/make_tiny_qwen3.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

SEED = 20240917
LENGTHS = (9, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "tests" / "goldens"
    )
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    config = transformers.Qwen3Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},  # no one's default
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = transformers.Qwen3ForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                # Larger than the default 0.02: attention must be far from uniform.
                weight.normal_(0.0, 0.15)
        arrays = {}
        for index, length in enumerate(LENGTHS):
            ids = torch.randint(config.vocab_size, (length,))
            arrays[f"ids_{index}"] = ids.numpy().astype(np.int32)
            arrays[f"logits_{index}"] = model(ids[None]).logits[0].numpy()
    model.save_pretrained(out / "tiny_qwen3")
    np.savez_compressed(out / "tiny_qwen3_logits.npz", **arrays)


if __name__ == "__main__":
    main()
