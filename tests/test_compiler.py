"""XLA options: which are set, that this XLA knows them, and which flags are refused."""

import jax
import jax.numpy as jnp
import pytest

from jdet.compiler import EnvironmentRefused, check_environment, compiler_options, jit, xla_flags


def compiles_with(options) -> bool:
    """Whether XLA takes the options."""
    jax.jit(lambda x: x + 1, compiler_options=options).lower(jnp.zeros(())).compile()
    return True


def test_options_follow_the_platform():
    cpu = compiler_options("portable", "cpu")
    gpu = compiler_options("portable", "gpu")
    assert cpu == {"xla_allow_excess_precision": False}
    assert cpu.items() < gpu.items()
    assert gpu == compiler_options("portable", "cuda") == compiler_options("mosaic_gpu", "gpu")
    assert gpu["xla_gpu_autotune_level"] == 0
    assert not any("gpu" in name for name in cpu)
    assert compiler_options() == compiler_options("portable", jax.default_backend())


@pytest.mark.parametrize("platform", ["cpu", "gpu", "cuda", "tpu", None])
def test_plain_xla_gets_no_option(platform):
    assert compiler_options("xla", platform) == {}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_this_xla_knows_every_option(platform):
    for name, value in compiler_options("portable", platform).items():
        assert compiles_with({name: value}), name


def test_xla_does_not_ignore_unknown_options():
    """Were it so, the test above would tell nothing."""
    with pytest.raises(Exception, match="No such compile option.*xla_no_such_flag"):
        compiles_with({"xla_no_such_flag": True})


def test_jit_compiles_with_the_options(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "jdet.compiler.compiler_options", lambda implementation: asked.append(implementation) or {}
    )
    double = jit(lambda x, n: x * n, implementation="reference", static_argnames="n")
    assert double(jnp.float32(2), n=3) == 6
    assert asked == ["reference"]


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("", {}),
        ("--xla_a=1  -xla_b=x=y\t--xla_c", {"xla_a": "1", "xla_b": "x=y", "xla_c": ""}),
        ("--xla_a=1 --xla_a=2", {"xla_a": "2"}),
    ],
)
def test_flags_are_read(text, flags):
    assert xla_flags(text) == flags


FORBIDDEN = [
    "--xla_allow_excess_precision=true",
    "--xla_allow_excess_precision=1",
    "--xla_allow_excess_precision",
    "--xla_cpu_enable_fast_math=True",
    "--xla_cpu_enable_fast_math",
    "--xla_cpu_experimental_ynn_fusion_type=none",
    "--xla_cpu_experimental_ynn_fusion_type=invalid",
]


@pytest.mark.parametrize("flag", FORBIDDEN)
def test_flag_against_the_promise_is_refused(flag, monkeypatch):
    """The message names the flag as it was given, and both ways out."""
    message = f"--{flag.lstrip('-')}.*breaks batch invariance; remove it.*implementation='xla'"
    with pytest.raises(EnvironmentRefused, match=message):
        check_environment(f"--xla_force_host_platform_device_count=2 {flag}")
    monkeypatch.setenv("XLA_FLAGS", flag)
    with pytest.raises(EnvironmentRefused, match=message):
        check_environment()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "--xla_allow_excess_precision=false --xla_cpu_enable_fast_math=0",
        "--xla_force_host_platform_device_count=8 --xla_dump_to=somewhere",
        "--xla_cpu_experimental_ynn_fusion_type=dot",
    ],
)
def test_other_flags_are_left_alone(text, monkeypatch):
    check_environment(text)
    monkeypatch.setenv("XLA_FLAGS", text)
    check_environment()
    monkeypatch.delenv("XLA_FLAGS")
    check_environment()
