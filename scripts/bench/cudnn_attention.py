"""Plain XLA with cuDNN's attention: the faster baseline of the GPU benchmarks. Not invariant."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

import jdet
from jdet.pallas_kernels.attention.pages import contiguous


class CudnnOps(jdet.Ops):
    """A row's positions start at 0, or it is one query; padding is at a row's end.

    Pages go to cuDNN where their number is the one it wants, rows times pages of a row;
    elsewhere the rows are gathered first.
    """

    def attention(
        self,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        positions: Array,
        *,
        page_table: Array | None = None,
        **options: Any,
    ) -> Array:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        assert not any(v is not None for v in options.values())
        batch, length = q.shape[:2]
        last = positions.max(axis=1)
        keywords: dict[str, Any] = {
            "scale": q.shape[-1] ** -0.5,
            "mask_type": cudnn.MaskType.PADDING if length == 1 else cudnn.MaskType.PADDING_CAUSAL,
            "qkv_layout": "BNTH",
        }
        queries, keys = jnp.minimum(last + 1, length), last + 1
        heads = q.transpose(0, 2, 1, 3)
        if page_table is not None and length == 1 and page_table.size == k_cache.shape[0]:
            pages = page_table.reshape(batch, 1, -1, 1)
            y: Any = cudnn.paged_attention(
                heads, k_cache, v_cache, queries, keys, pages, pages, **keywords
            )
            return y.transpose(0, 2, 1, 3)
        if page_table is not None:
            width = -(-length // k_cache.shape[2]) if length > 1 else page_table.shape[1]
            k_cache, v_cache = contiguous(
                k_cache, v_cache, page_table[:, :width], positions, k_cache.shape[2]
            )
        used = k_cache.shape[2] if length == 1 else length
        y = cudnn.dot_product_attention(
            heads,
            k_cache[:, :, :used],
            v_cache[:, :, :used],
            q_seqlen=queries,
            kv_seqlen=keys,
            **keywords,
        )
        return y.transpose(0, 2, 1, 3)
