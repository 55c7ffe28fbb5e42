"""What every way to run a batch over several devices is told, and the runner that comes of it."""

import argparse
import dataclasses
from pathlib import Path

import jdet
from jdet.batch.runner import BatchRunner


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """The model and the sizes of an engine, as plain values that travel between processes.

    Attributes:
      model, dtype, implementation: as for `jdet.load`; `model` is a name or a path that every
        host knows, and goes into the results.
      max_batch_size, max_tokens_per_step, max_model_len: as for `jdet.EngineConfig`; the last is
        cut to the model's context length.
    """

    model: str
    dtype: str
    implementation: str | None
    max_batch_size: int
    max_tokens_per_step: int
    max_model_len: int

    def runner(self) -> BatchRunner:
        """A runner with an engine of its own on the default device."""
        loaded = jdet.load(self.model, dtype=self.dtype, implementation=self.implementation)
        config = jdet.EngineConfig(
            max_batch_size=self.max_batch_size,
            max_tokens_per_step=self.max_tokens_per_step,
            max_model_len=min(self.max_model_len, loaded.config.max_position_embeddings),
        )
        return BatchRunner(jdet.Engine(loaded, config), self.model, self.dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files (`input`, `output`) and the fields of `BatchOptions`."""
    parser.add_argument("-i", "--input", type=Path, required=True, help="requests, one a line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="results, in that order")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", help="default: the invariant one of the device")
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--max-tokens-per-step", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=4096)


def options_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> BatchOptions:
    """The options given; exits by `parser.error` where there is no input."""
    if not args.input.is_file():
        parser.error(f"{args.input}: no such file")
    if not args.output.parent.is_dir():
        parser.error(f"{args.output}: there is no folder {args.output.parent}")
    names = [field.name for field in dataclasses.fields(BatchOptions)]
    return BatchOptions(**{name: getattr(args, name) for name in names})
