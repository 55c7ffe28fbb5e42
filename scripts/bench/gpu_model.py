"""Decode step and prefill of a published shape on one NVIDIA GPU: ours, plain XLA, the floor.

    python scripts/bench/gpu_model.py [--model Qwen3-8B] [--layers N] [--json FILE]
        [--decode 1,8,32,64,128] [--context 2048] [--prefill 1x8192,8x1024] [--profile]

Random weights; every column in one process, wall clock, medians. `xla` is the same model code
on plain XLA with jnp attention, `xla_cudnn` the same with cuDNN's attention: the better one is
the baseline of `ratio`. Neither is batch-invariant. A decode time is a step of STEPS in one call,
from the same place in the context each time.
Of a mixture `xla_cudnn` has the experts' products in XLA's best form too (xla_experts.py).
Floor of decode: bytes of the weights (of experts: those that the first step chose) and of the
cache that is read, over the measured copy rate; of prefill: operations over the measured rate of a
large product. `--profile` adds the device time of each kernel in one step, from the profiler's
trace.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cudnn_attention import CudnnOps  # pyright: ignore[reportMissingImports]
from timing import copy_rate, environment, events_of, matrix_rate  # pyright: ignore[reportMissingImports]
from xla_experts import ExpertOps, experts_read  # pyright: ignore[reportMissingImports]

import jdet
from jdet.cache import create_cache
from jdet.decoding import DecodeState, decode, prefill, round_up
from jdet.models.config import CONFIGS
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams, sampling_arrays

STEPS = 64
JNP_UP_TO = 1  # rows; above, jnp attention loses to cuDNN's (h100-qwen3-8b-first.json)


def greedy(batch: int) -> Any:
    params = SamplingParams(temperature=0, max_tokens=10**6, ignore_eos=True)
    return sampling_arrays([params] * batch)


def last_tokens(batch: int) -> jax.Array:
    """Another for each row, so that rows choose experts of their own."""
    return jnp.arange(1, batch + 1, dtype=jnp.int32)


def decode_runner(
    model: LanguageModel, batch: int, context: int
) -> tuple[Callable[[], float], float]:
    """(a function that runs STEPS steps and returns seconds, seconds to trace and compile)."""
    state = DecodeState(
        cache=create_cache(
            model.config,
            batch,
            round_up(context + 128, model.ops.contract.kv_split),
            model.decoder.dtype,
            fill=0.01,
        ),
        prompt_lengths=jnp.full(batch, context - 1, jnp.int32),
        last_token=last_tokens(batch),
        count=jnp.ones(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        token_ids=jnp.zeros((batch, 128), jnp.int32),
        logprobs=jnp.zeros((batch, 128), jnp.float32),
    )
    sampling = greedy(batch)
    jitted = jdet.jit(
        functools.partial(decode, ops=model.ops),
        implementation=model.ops.implementation,
        donate_argnames=("state",),
    )
    start = time.perf_counter()
    compiled = jitted.lower(model.decoder, state, sampling, jnp.int32(STEPS)).compile()
    seconds = time.perf_counter() - start
    held = [state]

    def run() -> float:
        held[0] = held[0]._replace(count=jax.block_until_ready(jnp.ones(batch, jnp.int32)))
        begin = time.perf_counter()
        held[0] = compiled(model.decoder, held[0], sampling, jnp.int32(STEPS))
        jax.block_until_ready(held[0].token_ids)
        return time.perf_counter() - begin

    return run, seconds


def prefill_runner(
    model: LanguageModel, batch: int, length: int
) -> tuple[Callable[[], float], float]:
    """(a function that runs one prefill and returns seconds, seconds to trace and compile)."""
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(0, model.config.vocab_size, (batch, length)), jnp.int32)
    lengths, sampling = jnp.full(batch, length, jnp.int32), greedy(batch)
    jitted = jdet.jit(
        functools.partial(
            prefill,
            max_tokens=1,
            cache_length=round_up(length, model.ops.contract.kv_split),
            ops=model.ops,
        ),
        implementation=model.ops.implementation,
    )
    start = time.perf_counter()
    compiled = jitted.lower(model.decoder, prompts, lengths, sampling).compile()
    seconds = time.perf_counter() - start

    def run() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(model.decoder, prompts, lengths, sampling).token_ids)
        return time.perf_counter() - begin

    return run, seconds


def kernels_of(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Device time a step by kernel, from a profiler trace."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        events = events_of(folder)
    total: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event in events:
        name = event.name.split("(")[0][:60]
        total[name] += event.duration_ns
        count[name] += 1
    return {
        "busy_ms": round(sum(total.values()) / steps / 1e6, 4),
        "launches": round(sum(count.values()) / steps, 1),
        "kernels": [
            {"name": n, "us": round(t / steps / 1e3, 2), "launches": round(count[n] / steps, 2)}
            for n, t in total.most_common(16)
        ],
    }


def measure(
    models: dict[str, LanguageModel],
    make: Callable[[LanguageModel], tuple[Callable[[], float], float]],
    steps: int,
    profile: bool,
) -> dict[str, Any]:
    """Milliseconds a step and seconds to compile, by model; the error of one that has no room."""
    row: dict[str, Any] = {}
    for name, model in models.items():
        try:
            run, row[f"{name}_compile_s"] = make(model)
            run()
            row[f"{name}_ms"] = statistics.median(run() for _ in range(3)) / steps * 1e3
            if profile and name != "xla":
                row[f"{name}_profile"] = kernels_of(run, steps)
            del run  # with its cache, before the next one is made
        except RuntimeError as error:
            row[f"{name}_error"] = str(error).splitlines()[0]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--implementation", default="mosaic_gpu")
    parser.add_argument("--model", default="Qwen3-8B")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--decode", default="1,8,32,64,128", help="batch sizes")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prefill", default="1x8192,8x1024", help="batch x length")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--limit", type=float, default=400, help="seconds; rows after it are left out"
    )
    args = parser.parse_args()
    begin = time.monotonic()
    config = CONFIGS[args.model]
    if args.layers:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    copy, matrix = copy_rate(), matrix_rate()
    result: dict[str, Any] = {
        **environment(),
        "model": f"{args.model} (random weights)",
        "layers": config.num_hidden_layers,
        "copy_bytes_per_s": copy,
        "matrix_flops_per_s": matrix,
        "method": f"wall clock, median of 3 calls; of {STEPS} steps each in decode",
        "rows": [],
    }
    ours = jdet.random_model(config, implementation=args.implementation)
    result["fingerprint"] = ours.ops.fingerprint
    plain = ours.with_ops(implementation="xla")
    baseline = ExpertOps if config.num_experts else CudnnOps
    models = {
        "ours": ours,
        "xla": plain,
        "xla_cudnn": dataclasses.replace(plain, ops=baseline("xla", plain.ops.contract)),
    }
    c = ours.config
    size = sum(x.nbytes for x in jax.tree.leaves(ours.decoder))
    weights = size if c.tie_word_embeddings else size - ours.decoder.embedding[...].nbytes
    # Bytes of one expert in every layer; the others of the weights are read whole.
    expert = 6 * c.hidden_size * c.moe_intermediate_size * c.num_hidden_layers
    idle = expert * (c.num_experts - c.num_experts_per_tok)
    # The head reads one row a prompt.
    products = 2 * ((weights - idle) / 2 - c.vocab_size * c.hidden_size)

    def finish(row: dict[str, Any], floor: float) -> None:
        row["floor_ms"] = floor * 1e3
        baselines = [row[k] for k in ("xla_ms", "xla_cudnn_ms") if k in row]
        if "ours_ms" in row and baselines:
            row["ratio"] = row["ours_ms"] / min(baselines)
            row["share_of_floor"] = row["floor_ms"] / row["ours_ms"]
        result["rows"].append(
            {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        )
        shown = {k: v for k, v in result["rows"][-1].items() if "profile" not in k}
        print(shown, flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    for batch in map(int, filter(None, args.decode.split(","))):
        if time.monotonic() - begin > args.limit:
            break
        cache = 4 * batch * args.context * c.num_key_value_heads * c.head_dim * c.num_hidden_layers
        measured = {k: m for k, m in models.items() if k != "xla" or batch <= JNP_UP_TO}
        row = {"what": "decode step", "batch": batch, "length": args.context}
        make = functools.partial(decode_runner, batch=batch, context=args.context)
        row |= measure(measured, make, STEPS, args.profile)
        read = weights
        if c.num_experts:
            row["experts_read"] = experts_read(ours, batch, args.context, last_tokens(batch))
            read -= expert * (c.num_experts - row["experts_read"])
        finish(row, (read + cache) / copy)
    for pair in filter(None, args.prefill.split(",")):
        if time.monotonic() - begin > args.limit:
            break
        batch, length = map(int, pair.split("x"))
        attention = 2 * batch * length**2 * c.num_attention_heads * c.head_dim
        row = {"what": "prefill", "batch": batch, "length": length}
        make = functools.partial(prefill_runner, batch=batch, length=length)
        # The scores of jnp attention do not fit in memory.
        measured = {k: m for k, m in models.items() if k != "xla"}
        row |= measure(measured, make, 1, args.profile)
        finish(row, (products * batch * length + attention * c.num_hidden_layers) / matrix)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    sys.path.insert(0, str(Path(__file__).parent))
    main()
