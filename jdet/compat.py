"""What differs between the jax versions this library runs on, in one place."""

import contextlib

import jax


def partitionable_threefry() -> contextlib.AbstractContextManager[None]:
    """Random bits that depend on (key, index) alone, not on the length of the draw."""
    return jax.threefry_partitionable(True)
