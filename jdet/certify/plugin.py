"""The pytest plugin, installed with the package: two fixtures and an option.

    def test_my_layer(assert_batch_invariant):
        assert_batch_invariant(my_layer, (x, weights), batch_axes=(0, None))

`--jdet-sizes 1,8,64` sets the batch sizes of every test that names none itself. Every pytest run
loads this module, so jax is imported where a fixture is first used.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """--jdet-sizes."""
    parser.getgroup("jdet").addoption(
        "--jdet-sizes",
        type=_sizes,
        metavar="N,N,...",
        help="batch sizes of assert_batch_invariant (one of them 2 or more)",
    )


def _sizes(text: str) -> tuple[int, ...]:
    import argparse

    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or max(sizes) < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give numbers from 1 up with commas between, one of them 2 or more"
        )
    return sizes


@pytest.fixture
def assert_same_bits() -> Callable[..., None]:
    """`jdet.certify.assert_same_bits`."""
    from jdet.certify import assertions

    return assertions.assert_same_bits


@pytest.fixture
def assert_batch_invariant(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`jdet.certify.assert_batch_invariant`, with the sizes of --jdet-sizes."""
    from jdet.certify import assertions

    sizes: Any = request.config.getoption("--jdet-sizes") or assertions.SIZES
    return functools.partial(assertions.assert_batch_invariant, sizes=sizes)
