"""Whole models on one NVIDIA GPU: bits alone against bits in batches, and the decode step's time.

    python scripts/check_gpu_model.py [--implementation portable] [--json FILE]
        [--batches 1,8,64] [--context 2048] [--skip-bits] [--skip-times]

Bits: a model of Qwen3-8B's widths (few layers) and one of SmolLM2's, random weights. Requests
of 1, 40, 253 and 601 tokens alone, against the same requests in batches of 5 and 33 among
random neighbours, with padding and unused cache slots poisoned; the same under plain XLA,
which must fail. Times: one decode step of Qwen3-8B's full shape, random weights, ours and
plain XLA in the same process, wall clock over STEPS steps in one call; the floor is the bytes
of the weights and of the read cache over the measured copy rate. Exit status 1 on a mismatch.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdet
from jdet.cache import KVCache, create_cache
from jdet.decoding import DecodeState, decode
from jdet.environment import versions
from jdet.models.config import CONFIGS, DecoderConfig
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams, sampling_arrays
from jdet.testing import compose, run_batch, same_bits, small_config

STEPS = 16
TOKENS = 6
LENGTHS = (1, 40, 253, 601)
WIDTH, CACHE = 640, 1024


def in_batch(model: LanguageModel, batch_size: int, *, poison: bool) -> list[Any]:
    """Results of the requests in one batch, at random rows; alone for batch_size 0."""
    vocab = model.config.vocab_size
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    requests = [(np.random.default_rng(n).integers(0, vocab, n).tolist(), greedy) for n in LENGTHS]
    if batch_size == 0:
        # One shape for all: what varies is the batch.
        return [
            run_batch(model, [r], max_tokens=TOKENS, width=WIDTH, cache_length=CACHE)[0]
            for r in requests
        ]
    crowd = compose(
        batch_size,
        batch_size=batch_size - len(LENGTHS) + 1,
        row=0,
        vocab_size=vocab,
        max_length=WIDTH,
        max_tokens=TOKENS,
    )
    requests += list(zip(map(list, crowd.neighbours), crowd.neighbour_sampling, strict=True))
    order = np.random.default_rng(batch_size).permutation(batch_size)
    out = run_batch(
        model,
        [requests[i] for i in order],
        max_tokens=TOKENS,
        width=WIDTH,
        cache_length=CACHE,
        cache_fill=float("nan") if poison else 0.0,
        poison_padding=poison,
    )
    return [out[int(np.argmax(order == i))] for i in range(len(LENGTHS))]


def check_bits(name: str, config: DecoderConfig, implementation: str) -> dict[str, Any]:
    """Compare alone and in batches; plain XLA must differ somewhere."""
    start = time.perf_counter()
    model = jdet.random_model(config, implementation=implementation)
    alone = in_batch(model, 0, poison=False)
    row: dict[str, Any] = {"model": name, "implementation": implementation, "mismatches": {}}
    for size in (5, 33):
        got = in_batch(model, size, poison=True)
        row["mismatches"][size] = sum(not same_bits(a, b) for a, b in zip(alone, got, strict=True))
    lengths_ok = all(len(ids) == TOKENS and np.isfinite(lp).all() for ids, lp in alone)
    row["finite"] = bool(lengths_ok)
    row["sha256"] = hashlib.sha256(b"".join(lp.tobytes() for _, lp in alone)).hexdigest()
    plain = model.with_ops(implementation="xla")
    solo, crowd = in_batch(plain, 0, poison=False), in_batch(plain, 33, poison=False)
    row["xla_mismatches_at_33"] = sum(not same_bits(a, b) for a, b in zip(solo, crowd, strict=True))
    # Right, too: ours and plain XLA round differently, and agree about the first token.
    row["largest_first_logprob_difference_to_xla"] = float(
        max(abs(a[1][0] - b[1][0]) for a, b in zip(alone, solo, strict=True) if a[0][0] == b[0][0])
    )
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def copy_rate() -> float:
    """Bytes read and written a second by a large copy."""
    x = jnp.ones(2**30, jnp.bfloat16)
    run = jax.jit(lambda x: x + jnp.bfloat16(1))
    run(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5):
            y = run(x)
        y.block_until_ready()
        times.append((time.perf_counter() - start) / 5)
    return 2 * x.nbytes / statistics.median(times)


def step_time(model: LanguageModel, batch: int, context: int) -> tuple[float, float]:
    """(milliseconds a decode step, seconds to trace and compile)."""
    cache: KVCache = create_cache(
        model.config, batch, context + 256, model.decoder.dtype, fill=0.01
    )
    state = DecodeState(
        cache=cache,
        prompt_lengths=jnp.full(batch, context - 1, jnp.int32),
        last_token=jnp.ones(batch, jnp.int32),
        count=jnp.ones(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        token_ids=jnp.zeros((batch, 128), jnp.int32),
        logprobs=jnp.zeros((batch, 128), jnp.float32),
    )
    greedy = SamplingParams(temperature=0, max_tokens=10**6, ignore_eos=True)
    sampling = sampling_arrays([greedy] * batch)
    run = jdet.jit(
        functools.partial(decode, ops=model.ops),
        implementation=model.ops.implementation,
        donate_argnames=("state",),
    )
    start = time.perf_counter()
    compiled = run.lower(model.decoder, state, sampling, jnp.int32(STEPS)).compile()
    seconds = time.perf_counter() - start
    times = []
    for _ in range(4):
        start = time.perf_counter()
        state = compiled(model.decoder, state, sampling, jnp.int32(STEPS))
        jax.block_until_ready(state.token_ids)
        times.append((time.perf_counter() - start) / STEPS * 1e3)
    return statistics.median(times[1:]), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--implementation", default="portable")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--skip-bits", action="store_true")
    parser.add_argument("--skip-times", action="store_true")
    args = parser.parse_args()
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "versions": versions(),
        "command": "python scripts/check_gpu_model.py " + " ".join(sys.argv[1:]),
        "bits": [],
        "times": [],
    }

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    if not args.skip_bits:
        qwen = dataclasses.replace(CONFIGS["Qwen3-8B"], num_hidden_layers=3)
        small = DecoderConfig.from_hf(small_config(layers=3))
        for name, config in (("SmolLM2 widths, 3 layers", small), ("Qwen3-8B, 3 layers", qwen)):
            row = check_bits(name, config, args.implementation)
            result["bits"].append(row)
            print(row, flush=True)
            save()
    if not args.skip_times:
        rate = copy_rate()
        result["copy_bytes_per_s"] = rate
        ours = jdet.random_model("Qwen3-8B", implementation=args.implementation)
        plain = ours.with_ops(implementation="xla")
        weights = sum(x.nbytes for x in jax.tree.leaves(ours.decoder))
        weights -= ours.decoder.embedding[...].nbytes  # a step reads rows of it
        c = ours.config
        for batch in map(int, args.batches.split(",")):
            kv = 4 * batch * args.context * c.num_key_value_heads * c.head_dim
            kv *= c.num_hidden_layers
            row = {"what": "decode step, Qwen3-8B", "batch": batch, "context": args.context}
            row["ours_ms"], row["ours_compile_s"] = step_time(ours, batch, args.context)
            row["xla_ms"], row["xla_compile_s"] = step_time(plain, batch, args.context)
            row["floor_ms"] = (weights + kv) / rate * 1e3
            row["ratio"] = row["ours_ms"] / row["xla_ms"]
            result["times"].append(
                {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            )
            print(result["times"][-1], flush=True)
            save()
    wrong = [
        r
        for r in result["bits"]
        if any(r["mismatches"].values()) or not r["finite"] or not r["xla_mismatches_at_33"]
    ]
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    sys.exit(main())
