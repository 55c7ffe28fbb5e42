"""certify: the promise, tried on this device with this model, for so many minutes."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jdet.certify.campaign import Campaign
from jdet.certify.certificate import GUARANTEES, Certificate, Result
from jdet.certify.second_process import Recipe, check_shape
from jdet.compiler import check_environment, compiler_options, xla_flags
from jdet.environment import device, versions
from jdet.models.load import LanguageModel


def certify(
    model: str | LanguageModel,
    *,
    minutes: float = 5.0,
    guarantees: Sequence[str] | None = None,
    seed: int = 0,
    batch: int | None = None,
    trials: int | None = None,
    dtype: str = "bfloat16",
    implementation: str | None = None,
    random_weights: bool = False,
    layers: int | None = None,
    replay: Mapping[str, Any] | None = None,
    other: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Certificate:
    """Try the guarantees with random compositions and compare bits with runs alone.

    Each composition goes through the real `jdet.Engine`, `jdet.generate` or `jdet.score`. What
    counts is what the engine did, not what was asked of it. Plain XLA is given the same ones and
    must differ. It ends at the time given, or soon after: a compile is not interrupted. Stopped
    by Ctrl-C or for want of memory it returns what was done, and does not pass.

    Args:
      model: what `jdet.load` takes, or a model. Only one given by name can be made again in a
        second process (G9).
      guarantees: names like "G4" to ask for; None: all that apply here.
      seed: of prompts and compositions.
      batch: requests at once, at most; None: 16 on CPU, 64 elsewhere.
      trials: so many of each guarantee are enough; None: as many as the time allows.
      dtype, implementation: of a model given by name.
      random_weights: the name is a published shape, as `jdet.random_model` takes it.
      layers: of such a shape, so many; None: all.
      replay: what `Certificate.to_json` gave: its failures, and then its compositions again, in
        place of `guarantees`, `seed` and `batch`.
      other: the same of a run on another card of this architecture, to test G11.
      progress: a bar on stderr; None: where that is a terminal.

    Raises:
      ValueError: an unknown guarantee, a time or a batch that is none, and what `load` raises.
      EnvironmentRefused: XLA_FLAGS holds a flag against the promise.
    """
    settings = _settings(minutes, guarantees, seed, batch, replay)
    if trials is not None:
        if replay is not None or trials < 1:
            raise ValueError(f"trials={trials}; allowed: from 1, without a replay")
        settings["trials"] = trials
    if layers is not None and not random_weights:
        raise ValueError(f"layers={layers}; allowed: with random_weights, a model has its own")
    if implementation != "xla":
        check_environment()
    recipe = None
    start = time.monotonic()
    if isinstance(model, str):
        if random_weights:
            check_shape(model, layers)
        recipe = Recipe(model, random_weights, dtype, implementation, layers)
        name, made = model, recipe.make()
        # The second process's implementation is this one's, whatever it finds.
        recipe = dataclasses.replace(recipe, implementation=made.ops.implementation)
        # What `jdet certify --replay` loads.
        settings["source"] = {
            "model": None if random_weights else name,
            "shape": name if random_weights else None,
            "layers": layers,
        }
    else:
        made = model
    certificate = Certificate(
        subject=_subject(made),
        environment=_environment(made),
        settings=settings,
        guarantees={name: Result(name) for name in GUARANTEES},
    )
    return Campaign(made, recipe, certificate, start, progress, replay, other).run()


def _settings(
    minutes: float,
    guarantees: Sequence[str] | None,
    seed: int,
    batch: int | None,
    replay: Mapping[str, Any] | None,
) -> dict[str, Any]:
    if replay is not None:
        try:
            known = dict(replay["settings"])
            guarantees, seed, batch = (known[k] for k in ("guarantees", "seed", "batch"))
        except (KeyError, TypeError):
            raise ValueError("replay: not what Certificate.to_json gives") from None
    batch = batch or (16 if jax.default_backend() == "cpu" else 64)
    names = list(dict.fromkeys(guarantees)) if guarantees is not None else None
    unknown = [g for g in names or () if g not in GUARANTEES]
    if unknown or names == []:
        raise ValueError(f"guarantees={names}; allowed: {', '.join(GUARANTEES)}")
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes={minutes}; allowed: above 0")
    if not isinstance(batch, int) or not 4 <= batch <= 1024:
        raise ValueError(f"batch={batch}; allowed: integers from 4 to 1024")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed}; allowed: integers from 0")
    return {"seed": seed, "batch": batch, "minutes": minutes, "guarantees": names}


def _subject(model: LanguageModel) -> dict[str, Any]:
    contract = model.ops.contract
    return {
        "model": model.name,
        "implementation": model.ops.implementation,
        "dtype": model.decoder.dtype.name,
        "layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.config.vocab_size,
        "contract": dataclasses.asdict(contract),
        "fingerprint": model.ops.fingerprint,
    }


def _environment(model: LanguageModel) -> dict[str, Any]:
    return {
        "device": device(),
        "versions": versions(),
        "compiler_options": compiler_options(model.ops.implementation),
        "xla_flags": xla_flags(),
        # Programs from a cache were compiled by another process; the second one never reads it.
        "compilation_cache": bool(
            jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache
        ),
    }
