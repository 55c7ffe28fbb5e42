# %% [markdown]
# # The same question, the same answer
#
# At temperature 0 a language model should answer one question in one way. In *Defeating
# Nondeterminism in LLM Inference* (Thinking Machines, 2025) one prompt, sent 1000 times, had 80
# answers: the size of a batch decides in which order a matrix product or a softmax is added up, and
# who else is asking decides the size.
#
# This page (`make story` runs it) shows it in JAX, and mends it with one line, on a model that
# nobody here wrote: the Llama of [google-tunix](https://github.com/google/tunix), in Flax NNX, with
# the weights of SmolLM2-135M-Instruct, on a CPU.

# %%
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from foreign_models.example import bare_package

import jdet

bare_package("tunix")  # its models without its trainers
from tunix.models.llama3.model import Llama3, ModelConfig  # noqa: E402

smollm2 = jdet.load("smollm2-135m-instruct", dtype="bfloat16")

# %% [markdown]
# The model, as published, and its weights.

# %%
D, F, HEADS, KV, H = 576, 1536, 9, 3, 64
config = ModelConfig(
    30, 49152, D, F, HEADS, H, KV, rope_theta=10_000, norm_eps=1e-5, weight_tying=True
)
model = nnx.eval_shape(lambda: Llama3(config, rngs=nnx.Rngs(0)))
model.embedder.input_embedding.set_value(smollm2.decoder.embedding[...])
model.final_norm.w.set_value(smollm2.decoder.norm[...])
for theirs, ours in zip(model.layers, smollm2.decoder.layers, strict=True):
    q, k, v = jnp.split(ours.attention.qkv[...].T, (HEADS * H, (HEADS + KV) * H), axis=1)
    theirs.attn.q_proj.w.set_value(q.reshape(D, HEADS, H))
    theirs.attn.k_proj.w.set_value(k.reshape(D, KV, H))
    theirs.attn.v_proj.w.set_value(v.reshape(D, KV, H))
    theirs.attn.o_proj.w.set_value(ours.attention.out[...].T.reshape(HEADS, H, D))
    theirs.mlp.gate_proj.kernel.set_value(ours.mlp.gate_up[:F].T)
    theirs.mlp.up_proj.kernel.set_value(ours.mlp.gate_up[F:].T)
    theirs.mlp.down_proj.kernel.set_value(ours.mlp.down[...].T)
    theirs.input_layernorm.w.set_value(ours.attention_norm[...])
    theirs.post_attention_layernorm.w.set_value(ours.mlp_norm[...])
structure, weights = nnx.split(model)

# %% [markdown]
# Greedy decoding of a batch: the prompt once, then a token at a time.

# %%
STEPS = 48


def generate(weights, prompts):
    model = nnx.merge(structure, weights)
    size, length = prompts.shape
    empty = jnp.zeros((size, length + STEPS, KV, H), jnp.bfloat16)
    layer = {"k": empty, "v": empty, "end_index": jnp.zeros((size,), jnp.int32)}

    def read(tokens, start, cache):
        at = start + jnp.arange(tokens.shape[1])
        mask = at[:, None] >= jnp.arange(length + STEPS)
        at, mask = (jnp.broadcast_to(x, (size, *x.shape)) for x in (at, mask))
        logits, cache = model(tokens, at, cache, mask)
        return logits[:, -1].argmax(-1).astype(jnp.int32), cache

    def step(carry, i):
        token, cache = carry
        return read(token[:, None], length + i, cache), token

    first = read(prompts, 0, {f"layer_{i}": layer for i in range(30)})
    return jax.lax.scan(step, first, jnp.arange(STEPS, dtype=jnp.int32))[1].T


# %% [markdown]
# One prompt, alone and among others, in batches of seven sizes. `jax.jit` of the model as it is:

# %%
chat = [{"role": "user", "content": "Tell me about Richard Feynman"}]
prompt = np.asarray(smollm2.tokenizer.encode(smollm2.tokenizer.chat_prompt(chat)), np.int32)


def answers(generate):
    """Prints the prompt's completions, each from a batch of another size."""
    rng, found, seconds = np.random.default_rng(0), [], 0.0
    for size in (1, 2, 3, 5, 8, 17, 33):
        batch = rng.integers(1000, 49000, (size, len(prompt)), np.int32)
        batch[size // 2] = prompt
        jax.block_until_ready(generate(weights, batch))  # compiled
        start = time.perf_counter()
        made = np.asarray(generate(weights, batch))
        seconds += time.perf_counter() - start
        found.append(smollm2.tokenizer.decode(made[size // 2].tolist()))
    print(f"{len(found)} batches, unique answers: {len(set(found))}, {seconds:.1f} s")
    for text in dict.fromkeys(found):
        print("-", text)


answers(jax.jit(generate))

# %% [markdown]
# Now the one line.

# %%
answers(jax.jit(jdet.batch_invariant(generate)))

# %% [markdown]
# What it did: every operation that sums, or rounds by the shape of its array, has become a twin of
# jdet's, whose order follows the extent that it sums over and nothing else. (`print(report)` names
# the source line of each.)

# %%
report = jdet.batch_invariant.explain(generate)(weights, prompt[None])
twins = Counter(entry.primitive for entry in report.entries if entry.choice.action == "twin")
print(", ".join(f"{count} {name}" for name, count in twins.most_common()))
