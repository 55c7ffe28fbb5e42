"""How long a model takes to load: its GGUF file against the folder `jdet convert` makes of it.

    python scripts/bench/loading.py --json cpu-loading-smollm2.json
    python scripts/bench/loading.py --config Qwen3-0.6B --kind Q4_K --json cpu-loading-q4_k.json

Each load is a process of its own, the two kinds by turns, files in the page cache. Seconds of
`jdet.load` in that process: `first`, Orbax's import among them, and `again`. CPU seconds and the
load average beside them, since other work on the machine slows what is measured. With --config, a
GGUF file of random blocks in that shape is written first: K-quants are what most published files
hold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from timing import environment  # pyright: ignore[reportMissingImports]

import jdet
from jdet.models.config import CONFIGS, DecoderConfig

CHILD = """
import json, sys, time
import jax, numpy as np
from flax import nnx
import jdet, jdet.models.load
import zlib
found = []
for _ in range(2):
    start, cpu = time.perf_counter(), time.process_time()
    model = jdet.load(sys.argv[1])
    state = jax.block_until_ready(nnx.state(model.decoder))
    found.append([time.perf_counter() - start, time.process_time() - cpu])
total = 0
for value in jax.tree.leaves(state):
    total = zlib.crc32(np.asarray(value).view(np.uint8), total)
print(json.dumps([found, total]))
"""


def write_gguf(path: Path, config: DecoderConfig, kind: gguf.GGMLQuantizationType) -> None:
    """A Qwen3 of this shape with random blocks, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    rng = np.random.default_rng(0)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]

    def matrix(name: str, rows: int, columns: int) -> None:
        size = (rows, columns // block * block_bytes)
        # Bytes that no float16 scale of a block makes infinite.
        writer.add_tensor(name, rng.integers(0, 100, size, np.uint8), raw_dtype=kind)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    matrix("token_embd.weight", config.vocab_size, hidden)
    norm("output_norm.weight", hidden)
    for i in range(config.num_hidden_layers):
        for part, rows, columns in (
            ("attn_q", config.num_attention_heads * dim, hidden),
            ("attn_k", config.num_key_value_heads * dim, hidden),
            ("attn_v", config.num_key_value_heads * dim, hidden),
            ("attn_output", hidden, config.num_attention_heads * dim),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            matrix(f"blk.{i}.{part}.weight", rows, columns)
        for part, size in (
            ("attn_norm", hidden),
            ("ffn_norm", hidden),
            ("attn_q_norm", dim),
            ("attn_k_norm", dim),
        ):
            norm(f"blk.{i}.{part}.weight", size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def timed(path: str) -> tuple[list[list[float]], int]:
    """Seconds and CPU seconds of two loads in a process, and a checksum of what they gave."""
    done = subprocess.run([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, check=True)
    return tuple(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", choices=[n for n in CONFIGS if n.startswith("Qwen3-")])
    parser.add_argument("--kind", default="Q4_K")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, converted = "smollm2-135m-instruct", Path(folder) / "converted"
        if args.config:
            source = str(Path(folder) / "model.gguf")
            kind = gguf.GGMLQuantizationType[args.kind]
            write_gguf(Path(source), CONFIGS[args.config], kind)
        start = time.perf_counter()
        jdet.convert(source, converted, progress=sys.stderr.isatty())
        seconds = time.perf_counter() - start
        runs = [(timed(source), timed(str(converted))) for _ in range(args.runs)]
        size = sum(f.stat().st_size for f in converted.rglob("*") if f.is_file())
    result: dict[str, Any] = {
        **environment(),
        "model": f"{args.config}, random {args.kind}" if args.config else source,
        "convert_seconds": round(seconds, 2),
        "converted_bytes": size,
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "same_bits": len({checksum for pair in runs for _, checksum in pair}) == 1,
    }
    for i, when in enumerate(("first", "again")):
        for j, what in enumerate(("seconds", "cpu_seconds")):
            gguf_time, ours = (
                statistics.median(pair[k][0][i][j] for pair in runs) for k in range(2)
            )
            result[f"{when}_{what}"] = {
                "gguf": round(gguf_time, 2),
                "converted": round(ours, 2),
                "ratio": round(gguf_time / ours, 2),
            }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(not result["same_bits"])


if __name__ == "__main__":
    sys.exit(main())
