"""A decoder without its weights: what a checkpoint must fit, and where each parameter goes."""

import collections
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jdet.io.checkpoint import Checkpoint, TensorSource
from jdet.io.errors import CheckpointError
from jdet.models.checkpoint import (
    check_parameters,
    check_tensors,
    entries,
    name_of,
    named_as_mapped,
    read_parameter,
)
from jdet.models.config import DecoderConfig
from jdet.models.decoder import Decoder

# One sharding for every parameter, or a function from a name and a shape to one.
type Placement = Sharding | Callable[[str, tuple[int, ...]], Sharding]


class Blank(NamedTuple):
    """A decoder that waits for its weights, and the checkpoint's tensors, which fit it.

    Attributes:
      flat: the decoder's state by path; `graph` is what `nnx.split` leaves beside it.
      wanted: the parameters by name: shape, dtype and place.
      tensors: under the names of the family's map; none of a converted checkpoint.
    """

    config: DecoderConfig
    graph: Any
    flat: dict[Any, Any]
    wanted: dict[str, jax.ShapeDtypeStruct]
    tensors: dict[str, TensorSource]


def blank(checkpoint: Checkpoint, dtype: DTypeLike, sharding: Placement | None = None) -> Blank:
    """Everything about a checkpoint that can be wrong, found before a weight is read.

    Raises:
      CheckpointError: an unsupported family, or weights that do not fit the config.
    """
    source = checkpoint.source
    try:
        config = DecoderConfig.from_hf(checkpoint.config)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    graph, state = nnx.split(Decoder(config, dtype=dtype, rngs=None))
    flat = dict(nnx.to_flat_state(state))
    names = {name_of(path): path for path, _ in entries(config)}
    wanted = {name: placed(sharding, name, flat[path]) for name, path in names.items()}
    tensors = named_as_mapped(config, checkpoint.tensors)
    if checkpoint.converted:
        check_parameters(checkpoint.converted.parameters, wanted, source)
    else:
        check_tensors(config, tensors, lambda p: flat[p].shape, source)
    return Blank(config, graph, flat, wanted, tensors)


def placed(sharding: Placement | None, name: str, value: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array with its place: one device where nothing is said.

    Raises:
      ValueError: its shape cannot be cut so.
    """
    if sharding is None:
        # Where new arrays go: jax.devices() begins with another host's, if there are several.
        (device,) = jnp.zeros(()).devices()
        chosen = SingleDeviceSharding(device)
    else:
        chosen = sharding if isinstance(sharding, Sharding) else sharding(name, value.shape)
    try:
        chosen.shard_shape(value.shape)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=chosen)
    except ValueError as error:
        raise ValueError(f"sharding of {name} {value.shape}: {error}") from None


def bytes_by_device(arrays: Iterable[jax.ShapeDtypeStruct]) -> dict[Any, int]:
    """What arrays take of each device's memory."""
    needed: dict[Any, int] = collections.Counter()
    for array in arrays:
        assert array.sharding is not None
        size = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for device in array.sharding.addressable_devices:
            needed[device] += size
    return needed


def parameters(model: Blank) -> Iterator[tuple[str, np.ndarray]]:
    """The decoder's parameters, each made of its tensors when it is asked for."""
    for path, names in entries(model.config):
        want = model.wanted[name_of(path)]
        value = read_parameter(model.config, path, model.tensors, names, want.dtype)
        yield name_of(path), value.reshape(want.shape)
