"""What holds for every test: strict promotion, 32 bits, checked shapes, fixed examples."""

import gc
import importlib.util
import pathlib

import hypothesis
import jax
import jaxtyping
import pytest

import jdet

# In an editable install, jdet.models and jdet.pallas_kernels come from a finder that the
# hook below cannot wrap. With the root on jdet's path, Python's own finder has them first.
jdet.__path__.append(str(pathlib.Path(__file__).parents[1]))
# The modules that take and give arrays; user input has checks of its own, with messages.
CHECKED = ("cache", "decoding", "engine.step", "models", "ops", "pallas_kernels", "rng", "scoring")
jaxtyping.install_import_hook([f"jdet.{name}" for name in CHECKED], "beartype.beartype")

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples in every run, and no limit on one that waits for a compile.
hypothesis.settings.register_profile("jdet", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("jdet")

# The files that take longest, the longest first: more than half of the suite's time.
_LONG = (
    *("test_invariance", "test_certify", "test_attention", "test_attention_mosaic_gpu"),
    *("test_engine", "test_rows", "test_generation", "test_qkv_heads", "test_soak"),
    *("test_attention_options", "test_demo", "test_readme", "test_cli"),
)


# Collected after each file, see below; by itself Python would search jax's objects all the time.
gc.set_threshold(100_000)


@pytest.fixture(autouse=True, scope="module")
def _programs_end_with_their_file():
    """A program of XLA:CPU is about ten memory maps. Linux gives a process 65,530; past them
    XLA crashes or hangs, and the whole suite's programs are more."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_collection_modifyitems(items):
    """Long files first: a worker that began one last would leave the other idle."""
    place = {name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(_LONG)))


# Tests with environments of their own: where jax's CUDA plugin is not installed, nothing can be
# compiled for a GPU, where libtpu is not, for a TPU; where Ray is not, there are no workers.
_NEEDS = {"gpu_compile": "jax_cuda13_plugin", "ray": "ray", "tpu_compile": "libtpu"}
collect_ignore = [name for name, needed in _NEEDS.items() if not importlib.util.find_spec(needed)]
