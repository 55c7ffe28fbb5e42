"""The pytest plugin, in a pytest of its own."""

import os
import pathlib
import subprocess
import sys

TESTS = """
import sys
assert "jax" not in sys.modules, "the plugin imported jax"
import jax.numpy as jnp

def test_same(assert_same_bits):
    assert_same_bits(jnp.ones(2), jnp.ones(2))

def test_differs(assert_same_bits):
    assert_same_bits(jnp.ones(2), jnp.array([1.0, 1.5]))

def test_row(assert_batch_invariant):
    assert_batch_invariant(lambda x: x * 2, (jnp.ones((1, 4)),))

def test_size(assert_batch_invariant):
    assert_batch_invariant(lambda x: x * x.shape[0], (jnp.ones((1, 4)),))
"""


def pytest_run(folder: pathlib.Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_theirs.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "jdet.certify.plugin", "-q", *options]
    # By its name alone: where this tree is installed its entry point would load it again.
    alone = {"JAX_PLATFORMS": "cpu", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **alone}, capture_output=True, text=True
    )


def test_fixtures_and_sizes(tmp_path: pathlib.Path) -> None:
    done = pytest_run(tmp_path, "--jdet-sizes", "3,7", "-p", "no:cacheprovider")
    assert "2 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "first at index (1,): 0x3f800000 (1.0) against 0x3fc00000 (1.5)" in done.stdout
    assert "row 0 of a batch of 3 has not the bits that it has alone" in done.stdout


def test_bad_sizes_are_refused(tmp_path: pathlib.Path) -> None:
    done = pytest_run(tmp_path, "--jdet-sizes", "1")
    assert done.returncode == 4
    assert "'1': give numbers from 1 up with commas between" in done.stderr
