"""What an example of somebody else's model is, and what several examples need."""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.random import Generator


class Example(NamedTuple):
    """A model from a package, with random weights, and what is fed to it.

    A request is what one row of a batch holds; requests stand in trees of NumPy arrays whose
    first axis counts them. Padding is garbage that the model is told to ignore.

    Attributes:
      plain: the model as published, jitted: weights and a batch, to outputs `[B, ...]`.
      invariant: the same under `jdet.batch_invariant`.
      weights: the first argument.
      requests: some random requests.
      extremes: some requests of values that spoil whatever they are mixed with.
      batch: of requests, a number of padded positions, and the garbage's source, the second
        argument, with the batch as the first axis of every array.
      real: of one row's output, the part that padding has no business with.
      pads: numbers of padded positions to compare; the first is the usual one.
      timed: batch sizes worth timing.
      about: the config, for the results.
    """

    plain: Any
    invariant: Any
    weights: Any
    requests: Callable[[Generator, int], Any]
    extremes: Callable[[Generator, int], Any]
    batch: Callable[[Any, int, Generator], Any]
    real: Callable[[np.ndarray], np.ndarray]
    pads: tuple[int, ...]
    timed: tuple[int, ...]
    about: dict[str, Any]


def bare_package(name: str) -> None:
    """Makes `name` importable by its modules alone: the package's own `__init__` is not run.

    For a package whose `__init__` imports far more than the module that is wanted needs.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package


def randomised(weights: Any, dtype: DTypeLike) -> Any:
    """Weights of which none is constant: initial zeros and ones become random numbers too.

    A fresh model's zeros (biases, whole layers in some) would hide what those layers compute.
    Floating-point arrays come back in `dtype`.
    """

    @jax.jit
    def one(leaf: jax.Array, key: jax.Array) -> jax.Array:
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
        noise = jax.random.normal(key, leaf.shape, jnp.float32) / jnp.sqrt(jnp.float32(fan_in))
        constant = jnp.min(leaf) == jnp.max(leaf)
        return jnp.where(constant, leaf.astype(jnp.float32) + noise, leaf).astype(dtype)

    leaves, structure = jax.tree.flatten(weights)
    for i, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaves[i] = one(leaf, jax.random.key(i))
    return jax.tree.unflatten(structure, leaves)


def random_nnx(make: Callable[[], nnx.Module], dtype: DTypeLike) -> tuple[Any, Any]:
    """The structure of a Flax NNX model with an `embedder`, and its weights.

    Not made under jit: a program of all the draws of 36 layers takes minutes to compile.
    """
    structure, state = nnx.split(nnx.eval_shape(make))
    weights = randomised(nnx.to_pure_dict(nnx.state(make())), dtype)
    embedder = weights["embedder"]
    embedder["input_embedding"] = spoiled(embedder["input_embedding"])
    nnx.replace_by_pure_dict(state, weights)
    return structure, state


class Tokens(NamedTuple):
    """Requests of a language model: prompts of one length, padded on the right.

    Attributes:
      vocabulary: the number of token ids. The last id has an embedding of extreme size
        (`spoiled`), and stands in extreme requests only.
      length: real tokens of a prompt.
    """

    vocabulary: int
    length: int

    def requests(self, rng: Generator, count: int) -> np.ndarray:
        return rng.integers(0, self.vocabulary - 1, (count, self.length), np.int32)

    def extremes(self, rng: Generator, count: int) -> np.ndarray:
        """Prompts of the last id alone."""
        return np.full((count, self.length), self.vocabulary - 1, np.int32)

    def batch(self, requests: np.ndarray, pad: int, rng: Generator) -> dict[str, np.ndarray]:
        """tokens and positions `[B, T]`, and a causal mask `[B, T, T]` without the padding."""
        count, width = len(requests), self.length + pad
        garbage = rng.integers(0, self.vocabulary - 1, (count, pad), np.int32)
        seen = np.tril(np.ones((width, width), bool)) & (np.arange(width) < self.length)
        return {
            "tokens": np.concatenate([requests, garbage], 1),
            "positions": np.tile(np.arange(width, dtype=np.int32), (count, 1)),
            "mask": np.tile(seen, (count, 1, 1)),
        }

    def real(self, logits: np.ndarray) -> np.ndarray:
        return logits[: self.length]


def spoiled(embedding: jax.Array) -> jax.Array:
    """An embedding `[V, D]` whose last row is 10,000 times as large."""
    return embedding.at[-1].multiply(1e4)


class Images(NamedTuple):
    """Requests of a vision model: images of one `shape`, without padding."""

    shape: tuple[int, ...]

    def requests(self, rng: Generator, count: int) -> np.ndarray:
        return rng.standard_normal((count, *self.shape)).astype(np.float32)

    def extremes(self, rng: Generator, count: int) -> np.ndarray:
        """Whole images of zeros, of large numbers, of infinities and of NaN, in turn."""
        values = np.resize(np.array([0, 1e30, np.inf, np.nan], np.float32), count)
        return np.broadcast_to(values.reshape(-1, *(1 for _ in self.shape)), (count, *self.shape))

    def batch(self, requests: np.ndarray, pad: int, rng: Generator) -> np.ndarray:
        return requests

    def real(self, output: np.ndarray) -> np.ndarray:
        return output
