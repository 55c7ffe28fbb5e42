"""What an engine is given once: its memory, its budgets and the shapes it compiles."""

import dataclasses
from collections.abc import Iterable

SMALLEST_PAGE = 16
_USUAL_LENGTH = 1024
_TUPLES = ("chunk_sizes", "chunk_rows", "decode_rows")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. None of them changes a bit of any result.

    Attributes:
      max_batch_size: requests that run at once (reading their prompt or generating).
      max_tokens_per_step: rows a step computes at most: one for each request that generates,
        the rest for chunks of prompts (padding included).
      max_model_len: tokens of prompt and completion together at most; None: the model's
        context length.
      page_size: tokens a page of the cache holds; a multiple of 16 that divides the
        contract's kv_split.
      num_pages: pages of the cache; None: enough for `max_batch_size` requests of 1024 tokens
        and for one of `max_model_len`.
      chunk_sizes: lengths a chunk of a prompt is padded to; None: powers of 4 from 16 to
        what fits `max_tokens_per_step`. Each compiles a few programs.
      chunk_rows: numbers of chunks that a step is compiled for, from 1, as far as they fit; None:
        powers of 4 up to `max_batch_size`.
      decode_rows: numbers of generating rows that a step without prompts is compiled for, up to
        `max_batch_size`; None: powers of 4.
      prefix_caching: keep the pages of finished requests for prompts that begin alike.
      max_logit_bias, max_stop_token_ids: what one request may ask for, a shape.

    Raises:
      ValueError: a value outside its range; the message names it and the range.
    """

    max_batch_size: int = 32
    max_tokens_per_step: int = 512
    max_model_len: int | None = None
    page_size: int = 64
    num_pages: int | None = None
    chunk_sizes: tuple[int, ...] | None = None
    chunk_rows: tuple[int, ...] | None = None
    decode_rows: tuple[int, ...] | None = None
    prefix_caching: bool = True
    max_logit_bias: int = 300
    max_stop_token_ids: int = 32

    def __post_init__(self) -> None:
        low = {"max_logit_bias": 0, "max_stop_token_ids": 0, "page_size": SMALLEST_PAGE}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in (*_TUPLES, "prefix_caching") or value is None:
                continue
            least = low.get(field.name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name}={value!r}; allowed: integers from {least}")
        if not isinstance(self.prefix_caching, bool):
            raise ValueError(f"prefix_caching={self.prefix_caching!r}; allowed: True, False")
        if self.page_size % SMALLEST_PAGE:
            raise ValueError(f"page_size={self.page_size}; allowed: multiples of {SMALLEST_PAGE}")
        room = self.max_tokens_per_step - self.max_batch_size
        if room < 1:
            raise ValueError(
                f"max_tokens_per_step={self.max_tokens_per_step}; allowed: from "
                f"{self.max_batch_size + 1}, more than max_batch_size={self.max_batch_size}: "
                "beside requests that generate, a prompt must be able to go on"
            )
        for name in _TUPLES:
            self._check_ascending(name)
        if self.chunk_rows is not None and self.chunk_rows[0] != 1:
            raise ValueError(f"chunk_rows={self.chunk_rows!r}; the first must be 1")
        if self.decode_rows is not None and self.decode_rows[-1] != self.max_batch_size:
            raise ValueError(
                f"decode_rows={self.decode_rows!r}; the last must be "
                f"max_batch_size={self.max_batch_size}"
            )
        sizes = self.chunk_sizes
        if sizes is None:
            return
        if sizes[0] > room:
            raise ValueError(
                f"chunk_sizes={sizes!r}; the first must be at most {room}, "
                "max_tokens_per_step - max_batch_size"
            )
        if sizes[-1] > self.max_tokens_per_step:
            raise ValueError(
                f"chunk_sizes={sizes!r}; allowed: up to "
                f"max_tokens_per_step={self.max_tokens_per_step}"
            )

    def _check_ascending(self, name: str) -> None:
        given = getattr(self, name)
        if given is None:
            return
        values = tuple(given) if isinstance(given, Iterable) else ()
        whole = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
        if not values or not whole or list(values) != sorted(set(values)):
            raise ValueError(f"{name}={given!r}; allowed: ascending integers from 1")
        object.__setattr__(self, name, values)

    def resolved(self, *, context_length: int, kv_split: int) -> "EngineConfig":
        """Self with every None filled in for a model of this context length.

        Raises:
          ValueError: sizes that do not fit the model or its contract.
        """
        length = self.max_model_len or context_length
        if length > context_length:
            raise ValueError(
                f"max_model_len={length}; allowed: up to {context_length}, the context length"
            )
        if kv_split % self.page_size:
            raise ValueError(
                f"page_size={self.page_size}; allowed: divisors of the contract's "
                f"kv_split={kv_split}"
            )
        room = self.max_tokens_per_step - self.max_batch_size
        sizes = self.chunk_sizes or tuple(
            size for size in (4**i for i in range(2, 12)) if size <= self.max_tokens_per_step
        )
        return dataclasses.replace(
            self,
            max_model_len=length,
            chunk_sizes=sizes if sizes and sizes[0] <= room else (room,),
            num_pages=self.num_pages
            or max(
                -(-length // self.page_size),
                self.max_batch_size * -(-min(length, _USUAL_LENGTH) // self.page_size),
            ),
        )

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Numbers of generating rows that a step without prompts is compiled for."""
        return self.decode_rows or _powers_of_4(self.max_batch_size)

    @property
    def chunk_shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, length) of the chunks of one step; of a resolved config."""
        assert self.chunk_sizes is not None
        heights = self.chunk_rows or _powers_of_4(self.max_batch_size)
        most = {size: self.max_tokens_per_step // size for size in self.chunk_sizes}
        return tuple(
            (rows, size)
            for size in self.chunk_sizes
            for rows in sorted({min(height, most[size]) for height in heights})
        )


def _powers_of_4(last: int) -> tuple[int, ...]:
    """1, 4, 16, ... below `last`, and `last`."""
    sizes = [1]
    while sizes[-1] * 4 < last:
        sizes.append(sizes[-1] * 4)
    return (*sizes, last) if last > sizes[-1] else tuple(sizes)
