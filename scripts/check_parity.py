"""Every family against transformers, layer by layer: hidden states and logits of random models.

    python scripts/check_parity.py --implementation portable,mosaic_gpu --json h100-parity.json

Needs torch (a CPU build will do) and transformers beside jax. No network: the models are those of
scripts/goldens/make_tiny_families.py, written anew to a temporary folder, in its sizes (`tiny`)
and in sizes that every kernel takes (`wide`).

The reference is transformers in float32 on the CPU, with bfloat16 weights. An error is the
distance of one token's vector to the reference's, relative to it; of all tokens of prompts of 7
to 300 tokens in one batch, padded with NaN, the largest counts. Then

- float32: the error is at most 1e-4 (transformers computes angles in float32, so positions of
  some hundreds alone are worth 1e-5);
- bfloat16: the error is at most twice that of transformers itself in bfloat16, at the same place.
  Of models with experts the median counts: where two experts are nearly tied, rounding chooses.

What an implementation cannot do is NOT APPLICABLE, with its reason. Exit status 1 if a row FAILED.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent / "bench"))
sys.path.insert(0, str(Path(__file__).parent / "goldens"))

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from make_tiny_families import (  # pyright: ignore[reportMissingImports]
    MODELS,
    load,
    save_random,
)
from timing import environment  # pyright: ignore[reportMissingImports]

import jdet
from jdet.cache import create_cache
from jdet.decoding import Group
from jdet.models.decoder import Layer
from jdet.models.load import LanguageModel
from jdet.models.moe import ExpertRows

LENGTHS = {"tiny": (7, 45), "wide": (7, 45, 300)}
WIDE = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}
LIMIT_FLOAT32, LIMIT_RATIO = 1e-4, 2.0

# Of each prompt, by place ("embeddings", "layer 0", ..., "norm", "logits"): [T, D] or [T, V].
type Places = dict[str, list[np.ndarray]]


def sized(config: Any, size: str) -> Any:
    """A config of make_tiny_families.py, or the same features in other sizes."""
    config = copy.deepcopy(config)
    if size == "wide":
        changes: dict[str, Any] = dict(WIDE)
        if "gemma" in config.model_type:
            changes["head_dim"] = 256
        if getattr(config, "moe_intermediate_size", None):
            changes["moe_intermediate_size"] = 256
        if getattr(config, "sliding_window", None):
            changes["sliding_window"] = 100
        for name, value in changes.items():
            setattr(config, name, value)
    return config


@torch.no_grad()
def original(folder: Path, prompts: list[np.ndarray], dtype: torch.dtype) -> Places:
    """What transformers computes; hidden states by hooks, as each layer returns them."""
    model = load(folder, dtype)
    seen: list[np.ndarray] = []

    def keep(_: Any, arguments: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        seen.append(value[0].float().numpy())

    inner = model.model
    inner.layers[0].register_forward_pre_hook(lambda m, arguments: keep(m, None, arguments[0]))
    for layer in [*inner.layers, inner.norm]:
        layer.register_forward_hook(keep)
    places: Places = {}
    for ids in prompts:
        seen.clear()
        logits = model(torch.tensor(ids, dtype=torch.long)[None]).logits[0].float().numpy()
        names = ["embeddings", *(f"layer {i}" for i in range(len(inner.layers))), "norm", "logits"]
        for name, value in zip(names, [*seen, logits], strict=True):
            places.setdefault(name, []).append(value)
    return places


def ours(model: LanguageModel, prompts: list[np.ndarray]) -> Places:
    """What jdet computes, the prompts in one batch. Layers are tapped as the decoder calls them."""
    longest = max(map(len, prompts))
    width, slots = -(-longest // 8) * 8, -(-longest // 256) * 256
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for i, ids in enumerate(prompts):
        tokens[i, : len(ids)], positions[i, : len(ids)] = ids, np.arange(len(ids))
    ops = model.ops
    layers = [f"layer {i}" for i in range(model.config.num_hidden_layers)]

    def forward(decoder: Any, tokens: Any, positions: Any) -> dict[str, Any]:
        seen: list[Any] = []
        plain = Layer.__call__

        def tapped(layer: Any, branch: Any, residual: Any, *rest: Any) -> Any:
            if not seen:
                seen.append(branch)
            found, after, cache = plain(layer, branch, residual, *rest)
            # The decoder adds a branch, and experts, in the norm that follows, and rounds there.
            y = ops.expert_sum(*found) if isinstance(found, ExpertRows) else found
            seen.append((y.astype(jnp.float32) + after.astype(jnp.float32)).astype(y.dtype))
            return found, after, cache

        # Plain XLA multiplies unused slots by 0.
        fill = 0.0 if ops.implementation == "xla" else float("nan")
        cache = create_cache(decoder.config, len(prompts), slots, decoder.dtype, fill)
        with mock.patch.object(Layer, "__call__", tapped):
            (hidden,), _ = decoder((Group(tokens, positions),), cache, ops)
        values = [s.reshape(*tokens.shape, -1) for s in seen]
        values += [hidden, decoder.logits(hidden, ops)]
        return dict(zip(["embeddings", *layers, "norm", "logits"], values, strict=True))

    run = jdet.jit(forward, implementation=ops.implementation)
    found = run(model.decoder, jnp.asarray(tokens), jnp.asarray(positions))
    return {
        name: [np.asarray(v[i, : len(p)], np.float32) for i, p in enumerate(prompts)]
        for name, v in found.items()
    }


def errors(got: Places, wanted: Places) -> dict[str, tuple[float, float]]:
    """The largest and the median relative error of a token, by place."""
    found = {}
    for name, values in wanted.items():
        a, b = (np.concatenate(v).astype(np.float64) for v in (got[name], values))
        each = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)
        found[name] = float(each.max()), float(np.median(each))
    return found


def compare(
    folder: Path, prompts: list[np.ndarray], implementation: str, dtype: str, known: dict[str, Any]
) -> dict[str, Any]:
    """One row: a model on an implementation in a dtype."""
    if implementation == "mosaic_gpu" and jax.devices()[0].platform != "gpu":
        return {"status": "NOT APPLICABLE", "reason": "mosaic_gpu runs on a GPU"}
    try:
        model = jdet.load(str(folder), dtype=dtype, implementation=implementation)
        places = ours(model, prompts)
    except NotImplementedError as error:
        return {"status": "NOT APPLICABLE", "reason": str(error)}
    except Exception as error:  # the other rows are worth their time
        return {"status": "FAILED", "reason": f"{type(error).__name__}: {error}"}
    if not all(np.isfinite(v).all() for values in places.values() for v in values):
        return {"status": "FAILED", "reason": "values that are not finite"}
    found, theirs = errors(places, known["float32"]), known["errors"][dtype]
    which = 1 if dtype == "bfloat16" and model.config.num_experts else 0
    limits = {
        name: LIMIT_FLOAT32 if dtype == "float32" else LIMIT_RATIO * theirs[name][which]
        for name in found
    }
    bad = [name for name in found if not found[name][which] <= limits[name]]
    same = [
        (a.argmax(-1) == b.argmax(-1)).mean()
        for a, b in zip(places["logits"], known["float32"]["logits"], strict=True)
    ]
    return {
        "status": "FAILED" if bad else "ok",
        "reason": f"over the limit at {', '.join(bad)}" if bad else "",
        "fingerprint": model.ops.fingerprint,
        "measure": ("largest", "median")[which],
        "places": {
            name: {
                "largest": found[name][0],
                "median": found[name][1],
                "transformers_largest": theirs[name][0],
                "transformers_median": theirs[name][1],
                "limit": limits[name],
            }
            for name in found
        },
        "same_argmax": float(np.mean(same)),
    }


def rows(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every row, models in their order."""
    for name in args.only:
        for size in args.sizes:
            config, place = sized(MODELS[name], size), folder / f"{name}-{size}"
            save_random(config, place)
            rng = np.random.default_rng(0)
            prompts = [rng.integers(0, config.vocab_size, n) for n in LENGTHS[size]]
            exact = original(place, prompts, torch.float32)
            rounded = original(place, prompts, torch.bfloat16)
            zero = dict.fromkeys(exact, (0.0, 0.0))
            known = {
                "float32": exact,
                "errors": {"float32": zero, "bfloat16": errors(rounded, exact)},
            }
            for implementation in args.implementation:
                for dtype in args.dtypes:
                    start = time.perf_counter()
                    row = compare(place, prompts, implementation, dtype, known)
                    yield {
                        "model": name.removeprefix("tiny_"),
                        "size": size,
                        "implementation": implementation,
                        "dtype": dtype,
                        **row,
                        "seconds": round(time.perf_counter() - start, 1),
                    }


def show(row: dict[str, Any]) -> None:
    """A line of the table: the errors by place, or why there are none."""
    head = f"{row['model']:<13}{row['size']:<6}{row['implementation']:<13}{row['dtype']:<10}"
    line = f"{head}{row['status']:<16}"
    if "places" in row:
        at = row["places"].values()
        line += " ".join(f"{p[row['measure']]:.1e}" for p in at)
        if row["dtype"] == "bfloat16":
            theirs = " ".join(f"{p['transformers_' + row['measure']]:.1e}" for p in at)
            line += f"  (transformers {theirs})"
    print(f"{line}  {row['reason']}".rstrip(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])

    def words(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--implementation", type=words, default=["portable"], help="a,b,...")
    parser.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    parser.add_argument("--sizes", type=words, default=list(LENGTHS))
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for implementation in args.implementation:
        jdet.Ops(implementation)  # an unknown name is refused before the first model is made
    for given, allowed in ((args.dtypes, ("float32", "bfloat16")), (args.sizes, tuple(LENGTHS))):
        if unknown := set(given) - set(allowed):
            parser.error(f"{', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    print("errors at the embeddings, after each layer, after the norm, and of the logits")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(args, Path(folder)):
            show(row)
            found.append(row)
    counts = {s: sum(r["status"] == s for r in found) for s in ("ok", "NOT APPLICABLE", "FAILED")}
    print(counts)
    result = {
        **environment(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "limits": {"float32": LIMIT_FLOAT32, "bfloat16 over transformers": LIMIT_RATIO},
        "counts": counts,
        "rows": found,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(counts["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
