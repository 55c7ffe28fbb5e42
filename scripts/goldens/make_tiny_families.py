"""Makes tests/goldens/tiny_<family>/ and its logits.npz with transformers.

Random models of two or three small layers, in the published format (bfloat16 weights; one of
them in shards), and their float32 logits. Every weight is random, norms and biases too, so that
a forgotten or exchanged one shows. Windows and the lengths that ropes were scaled from are
shorter than the prompts. Nothing of jdet is imported. See README.md beside this file for the
environment.

    python scripts/goldens/make_tiny_families.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

SEED = 20261123
LENGTHS = (7, 45)

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "tiny_llama3": transformers.LlamaConfig(
        **COMMON, rope_parameters=LLAMA3, attention_bias=True, head_dim=16, tie_word_embeddings=True
    ),
    "tiny_llama_linear": transformers.LlamaConfig(
        **{**COMMON, "num_key_value_heads": 4},
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "tiny_mistral": transformers.MistralConfig(
        **COMMON, rope_parameters={"rope_theta": 3000.0}, head_dim=16, sliding_window=9
    ),
    "tiny_qwen2": transformers.Qwen2Config(
        **COMMON,
        rope_parameters={"rope_theta": 3000.0},
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "tiny_qwen3_yarn": transformers.Qwen3Config(
        **COMMON,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 2.0,
        },
        head_dim=16,
        tie_word_embeddings=True,
    ),
    "tiny_qwen3_moe": transformers.Qwen3MoeConfig(
        **{**COMMON, "num_hidden_layers": 3},
        rope_parameters={"rope_theta": 3000.0},
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "tiny_gemma3": transformers.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 3},
        head_dim=16,
        sliding_window=9,
        sliding_window_pattern=3,
        query_pre_attn_scalar=24,
        final_logit_softcapping=10.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
}
IN_SHARDS = ("tiny_llama3",)


@torch.no_grad()
def save_random(config: transformers.PreTrainedConfig, folder: Path, shard: str = "1GB") -> None:
    """Writes a random model's config and bfloat16 weights."""
    torch.manual_seed(SEED)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    # Larger than the default 0.02: attention must be far from uniform.
    spread = 0.2 * (COMMON["hidden_size"] / config.hidden_size) ** 0.5
    for part, weight in model.named_parameters():
        if "norm" in part:
            low = -0.5 if "gemma" in config.model_type else 0.5
            weight.uniform_(low, low + 1)
        else:
            weight.normal_(0.0, spread)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A model that was written, in the implementation of attention that is plain torch."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def make(name: str, config: transformers.PreTrainedConfig, out: Path) -> None:
    """Writes one model and its logits."""
    save_random(config, out / name, "16KB" if name in IN_SHARDS else "1GB")
    model = load(out / name)
    arrays = {}
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(config.vocab_size, (length,))
        arrays[f"ids_{index}"] = ids.numpy().astype(np.int32)
        arrays[f"logits_{index}"] = model(ids[None]).logits[0].numpy()
    np.savez_compressed(out / name / "logits.npz", **arrays)
    print(name, model.num_parameters(), float(abs(arrays["logits_1"]).max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "tests" / "goldens"
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        make(name, MODELS[name], args.out)


if __name__ == "__main__":
    main()
