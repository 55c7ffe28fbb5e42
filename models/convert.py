"""From any model to a folder that loads faster: the decoder's own parameters, as they are."""

import importlib.metadata
import math
import shutil
from pathlib import Path

from jax.typing import DTypeLike
from tqdm import tqdm

from jdet.io.checkpoint import open_checkpoint, write_config
from jdet.io.converted import write
from jdet.io.errors import CheckpointError
from jdet.io.resolve import resolve
from jdet.models.blank import blank, parameters
from jdet.models.load import check_dtype


def convert(
    name_or_path: str,
    out: str | Path,
    *,
    dtype: DTypeLike = "bfloat16",
    progress: bool = False,
) -> Path:
    """Write a model as Orbax checkpoints, with config, tokenizer and chat template beside them.

    `load` restores it with the bits that it reads from the original in that dtype, and to many
    devices at once where it is told so. It is faster than what has to be dequantised or stacked:
    scripts/bench/results/cpu-loading-*.json. What is written goes to `out` + ".partial" and gets
    its name when it is whole; what a killed run left there is replaced. The host holds 2 GiB of
    weights and one parameter at a time, a device none.

    Args:
      name_or_path: as for `load`.
      out: the folder to make.
      dtype: "bfloat16" or "float32". A model converted to float32 loads in both.
      progress: a progress bar on stderr.

    Returns:
      `out`.

    Raises:
      ValueError: as `load`; `out` exists; no space for it; the model was converted before; Orbax
        is not installed.
    """
    dtype, out = check_dtype(dtype), Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists; a new folder is wanted")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"{out}: there is no folder {out.parent}")
    checkpoint = open_checkpoint(resolve(name_or_path))
    if checkpoint.converted:
        raise CheckpointError(f"{checkpoint.source} was converted before; copy the folder")
    model = blank(checkpoint, dtype)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    needed = sum(math.prod(w.shape) * w.dtype.itemsize for w in model.wanted.values())
    free = shutil.disk_usage(out.absolute().parent).free
    if needed > free:
        raise CheckpointError(
            f"{out}: its weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there"
        )
    partial.mkdir()
    try:
        write_config(partial, checkpoint.config)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(partial)
        weights = tqdm(
            parameters(model), "convert", len(model.wanted), disable=not progress, leave=False
        )
        description = {
            "jdet": importlib.metadata.version("jdet"),
            "source": Path(name_or_path).name,
        }
        write(partial, weights, description)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial.rename(out)
