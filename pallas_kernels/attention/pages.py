"""The paged KV cache as attention sees it: pages of slots, and a table of each row's pages.

Slot s of row b is slot s % page_size of page page_table[b, s // page_size]. The split of a slot
follows s alone, so a result has the bits that it has with a contiguous cache.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

PAGE_MULTIPLE = 16  # slots: what one copy of the Hopper kernels moves at least


def check_pages(page_table: Array, batch: int, page_size: int, kv_split: int) -> None:
    """Raise ValueError unless the table fits the batch, and pages the splits."""
    if page_table.ndim != 2 or page_table.shape[0] != batch or page_table.dtype != jnp.int32:
        raise ValueError(
            f"attention: page_table {page_table.dtype}{page_table.shape}; must be int32, a row for"
            f" each of {batch} rows of queries"
        )
    if page_size % PAGE_MULTIPLE or kv_split % page_size:
        raise ValueError(
            f"attention: pages of {page_size} slots; must be a multiple of {PAGE_MULTIPLE} that"
            f" divides kv_split={kv_split}"
        )


def gather_pages(
    pages: Float[Array, "P Hkv page D"],
    page_table: Int32[Array, "B N"],
    positions: Int32[Array, "B T"],
    kv_split: int,
) -> Float[Array, "B Hkv S D"]:
    """Each row's slots in one piece, up to a multiple of `kv_split`; zeros after its last key."""
    batch, row_pages = page_table.shape
    kv_heads, page_size, dim = pages.shape[1:]
    last = positions.max(axis=1, keepdims=True)
    # Entries after the last key may hold anything, and so may what they point at.
    used = jnp.arange(row_pages) * page_size <= last
    rows = pages[jnp.where(used, page_table, 0)].swapaxes(1, 2)
    rows = rows.reshape(batch, kv_heads, row_pages * page_size, dim)
    seen = jnp.arange(row_pages * page_size) <= last
    rows = jnp.where(seen[:, None, :, None], rows, jnp.zeros((), rows.dtype))
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % kv_split), (0, 0)))


def contiguous(
    k_cache: Float[Array, "P Hkv page D"],
    v_cache: Float[Array, "P Hkv page D"],
    page_table: Int32[Array, "B N"] | None,
    positions: Int32[Array, "B T"],
    kv_split: int,
) -> tuple[Float[Array, "B Hkv S D"], Float[Array, "B Hkv S D"]]:
    """Keys and values in one piece a row: as they are without a table."""
    if page_table is None:
        return k_cache, v_cache
    check_pages(page_table, positions.shape[0], k_cache.shape[2], kv_split)
    k, v = (gather_pages(x, page_table, positions, kv_split) for x in (k_cache, v_cache))
    return k, v


def split_count(
    cache: Float[Array, "P Hkv S D"], page_table: Int32[Array, "B N"] | None, kv_split: int
) -> int:
    """Splits of a row's slots, the last one perhaps not full of pages."""
    slots = cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    return -(-slots // kv_split)


def take_split(
    cache: Float[Array, "P Hkv S D"],
    page_table: Int32[Array, "B N"] | None,
    index: Int32[Array, ""],
    kv_split: int,
) -> Float[Array, "B Hkv split D"]:
    """Each row's slots of one split. What lies after the row's last key may be anything."""
    if page_table is None:
        return lax.dynamic_slice_in_dim(cache, index * kv_split, kv_split, 2)
    kv_heads, page_size, dim = cache.shape[1:]
    pages = kv_split // page_size
    # A table need not be full of splits: past its end any page will do.
    entries = jnp.take(page_table, index * pages + jnp.arange(pages), axis=1, mode="clip")
    rows = jnp.take(cache, entries, axis=0, mode="clip").swapaxes(1, 2)
    return rows.reshape(entries.shape[0], kv_heads, kv_split, dim)
