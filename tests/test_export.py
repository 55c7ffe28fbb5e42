"""Exported generation: the bits of the program it was made of, in another process too."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import pytest
from flax import nnx

import jdet
from jdet.certify import assert_same_bits
from jdet.export import read_header
from jdet.models.config import DecoderConfig
from jdet.models.decoder import Decoder
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingArrays
from jdet.testing import small_config, tiny_config

SIZES = {"batch_size": 3, "prompt_length": 9, "max_tokens": 5}
PROMPTS = np.random.default_rng(0).integers(0, 160, (3, 9)).astype(np.int32)
LENGTHS = np.array([9, 1, 4], np.int32)
SAMPLING = (
    jdet.SamplingParams(temperature=0, max_tokens=5),
    jdet.SamplingParams(temperature=0.9, seed=3, max_tokens=5),
    jdet.SamplingParams(temperature=0.9, top_k=7, seed=4, max_tokens=3),
)


@functools.cache
def model() -> LanguageModel:
    config = DecoderConfig.from_hf(tiny_config())
    return jdet.random_model(config, dtype="bfloat16", implementation="portable")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported for the CPU."""
    path = tmp_path_factory.mktemp("export") / "step.jdet"
    jdet.export.save(path, model(), platform="cpu", **SIZES)
    return path


@pytest.fixture(scope="module")
def wanted() -> Any:
    """What the program that was not exported gives."""
    generate = jdet.jit(jdet.generate_tokens, static_argnames=("max_tokens", "ops"))
    given = model().decoder, PROMPTS, LENGTHS, jdet.sampling_arrays(SAMPLING)
    return generate(*given, max_tokens=5, ops=model().ops)


def test_loaded_it_gives_the_bits_of_the_program_not_exported(file: Path, wanted: Any) -> None:
    generate = jdet.export.load(file, model())
    found = generate(PROMPTS, LENGTHS, jdet.sampling_arrays(SAMPLING))
    assert_same_bits(found, wanted)
    assert found.count.tolist() == [5, 5, 3]
    other = generate(PROMPTS[::-1], LENGTHS, jdet.sampling_arrays(SAMPLING))
    with pytest.raises(AssertionError):
        assert_same_bits(other, wanted)


def test_another_process_that_traces_nothing_gives_the_same_bits(
    file: Path, wanted: Any, tmp_path: Path
) -> None:
    given, results = tmp_path / "given.npz", tmp_path / "results.npz"
    sampling = jdet.sampling_arrays(SAMPLING)._asdict()
    np.savez(given, prompts=PROMPTS, lengths=LENGTHS, **jax.device_get(sampling))
    child = Path(__file__).with_name("export_child.py")
    command = [sys.executable, str(child), str(file), str(given), str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(results) as found:
        assert_same_bits(dict(found), jax.device_get(wanted)._asdict())


def test_the_calling_convention(file: Path) -> None:
    """Weights, prompts, lengths and each field of SamplingArrays, in order; four arrays back."""
    program = jdet.export.load(file, model()).program
    assert program.platforms == ("cpu",) and program.nr_devices == 1
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    assert low <= program.calling_convention_version <= high
    assert not program.disabled_safety_checks
    assert not program.ordered_effects and not program.unordered_effects
    leaves = jax.tree.leaves(model().decoder)
    given = [*leaves, PROMPTS, LENGTHS, *jdet.sampling_arrays(SAMPLING)]
    assert [(a.shape, a.dtype) for a in program.in_avals] == [(x.shape, x.dtype) for x in given]
    assert program.module_kept_var_idx[: len(leaves)] == tuple(range(len(leaves)))
    assert [a.str_short() for a in program.out_avals] == [
        *("int32[3,5]", "float32[3,5]", "int32[3]", "bool[3]")
    ]


@pytest.mark.parametrize(
    ("implementation", "platform", "kernel"),
    [
        ("portable", "tpu", None),
        ("portable", "cuda", None),
        ("mosaic_gpu", "cuda", "mosaic_gpu"),
        ("mosaic_tpu", "tpu", "tpu_custom_call"),
    ],
)
def test_a_cpu_exports_for_other_platforms(
    implementation: str, platform: str, kernel: str | None, tmp_path: Path
) -> None:
    """No weights are there, only their shapes."""
    config = DecoderConfig.from_hf(small_config("qwen3", layers=1))
    decoder = nnx.eval_shape(lambda: Decoder(config, dtype="bfloat16", rngs=nnx.Rngs(0)))
    abstract = LanguageModel("abstract", decoder, None, jdet.Ops(implementation))
    path = tmp_path / "step.jdet"
    header = jdet.export.save(path, abstract, platform=platform, **SIZES)
    assert read_header(path) == header
    assert (header.platform, header.implementation) == (platform, implementation)
    assert header.fingerprint == abstract.ops.fingerprint
    assert kernel is None or kernel.encode() in path.read_bytes()
    with pytest.raises(ValueError, match=f"platform {platform}, here cpu"):
        jdet.export.load(path, abstract)


def rewritten(file: Path, target: Path, **changes: Any) -> Path:
    """The file with another header."""
    magic, line, program = file.read_bytes().split(b"\n", 2)
    header = json.dumps(json.loads(line) | changes).encode()
    target.write_bytes(b"\n".join((magic, header, program)))
    return target


def test_what_does_not_match_is_refused_by_name(file: Path, tmp_path: Path) -> None:
    def refused(path: Path, message: str, here: LanguageModel | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            jdet.export.load(path, here or model())

    versions = read_header(file).versions
    old = rewritten(file, tmp_path / "old", versions=versions | {"jax": "0.1.2"})
    refused(old, f"jax 0.1.2, here {jax.__version__}")
    other = rewritten(file, tmp_path / "fingerprint", fingerprint="0" * 16)
    refused(other, f"fingerprint 0000000000000000, here {model().ops.fingerprint}")
    refused(file, "'leaves': 1.*here.*'leaves': 2", model().with_ops(contract=jdet.Contract(2)))
    refused(file, "implementation portable, here xla", model().with_ops(implementation="xla"))
    wide = dataclasses.replace(model().config, intermediate_size=128)
    refused(file, "weight .*, here bfloat16", jdet.random_model(wide, implementation="portable"))

    magic, line, program = file.read_bytes().split(b"\n", 2)
    for content, message in (
        (b"anything", "no file of jdet.export's"),
        (b"\n".join((magic, line, program[:-1])), "damaged"),
        (b"\n".join((magic, line[:-1], program)), "damaged"),
        (rewritten(file, tmp_path / "key", more=1).read_bytes(), "damaged"),
    ):
        (tmp_path / "damaged").write_bytes(content)
        refused(tmp_path / "damaged", message)


def test_arguments_of_other_shapes_are_refused(file: Path) -> None:
    generate = jdet.export.load(file, model())
    sampling = jdet.sampling_arrays(SAMPLING)
    with pytest.raises(ValueError, match=r"prompts is int32\[3, 8\].*takes int32\[3, 9\]"):
        generate(PROMPTS[:, :8], LENGTHS, sampling)
    with pytest.raises(ValueError, match=r"prompt_lengths is int64"):
        generate(PROMPTS, LENGTHS.astype(np.int64), sampling)
    many = jdet.SamplingParams(temperature=0, stop_token_ids=tuple(range(9)))
    with pytest.raises(ValueError, match=r"stop_token_ids is int32\[3, 9\].*int32\[3, 8\]"):
        generate(PROMPTS, LENGTHS, SamplingArrays(*jdet.sampling_arrays([many] * 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "rocm"}, "platform='rocm'; allowed: cpu, cuda, tpu"),
        ({"batch_size": 0}, "batch_size=0; allowed: integers from 1"),
        ({"max_tokens": 2.0}, "max_tokens=2.0; allowed"),
        ({"prompt_length": 2044}, "prompt_length=2044 and max_tokens=5; together at most 2048"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_work(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        jdet.export.save(tmp_path / "x", model(), **{"platform": "cpu", **SIZES, **changes})
    assert not list(tmp_path.iterdir())


def test_kernels_are_not_exported_for_another_platform(tmp_path: Path) -> None:
    kernels = model().with_ops(implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="platform='tpu': mosaic_gpu is for cuda alone"):
        jdet.export.save(tmp_path / "x", kernels, platform="tpu", **SIZES)
