"""Sparse-step attention straight from the cache, by index: `small_attention` without `compact` before it.

It reads scattered rows at every step instead of once per block; for comparison, and where memory for the buffers is
short.
"""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose, tensor_core_limit
from mage_kernels.gather_attention import reference
from mage_kernels.layout import by_token, check_block, check_counts, check_last_stride, check_rows, check_shape


def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    *,
    own_key: Tensor,
    own_value: Tensor,
    block: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over keys `index` of the cache and the block's own.

    Args:
        query: (batch, KV heads, R, D) packed rows, any R; bf16 or fp16 for Triton, D at most 256.
        key, value: (batch, KV heads, capacity, D), same dtype; the last dimension contiguous.
        index: (batch, KV heads, k) int32 positions, as from `top_k`; a duplicate counts twice.
        count: (batch, KV heads) int32: how many of them are meant, the first ones.
        scale: factor on the logits.
        own_key, own_value: (batch, KV heads, B, D) of the block, always visible.
        block: as for `small_attention`.

    Returns:
        out, log_mass: as `small_attention`.
    """
    op = "gather_attention"
    check_rows(op, query, key, value)
    check_counts(op, "index", index, (*query.shape[:2], index.shape[-1]))
    check_counts(op, "count", count, tuple(query.shape[:2]))
    check_shape(op, "own_key", own_key, (*query.shape[:2], own_key.shape[-2], query.shape[-1]))
    check_shape(op, "own_value", own_value, tuple(own_key.shape))
    check_last_stride(op, "own_key", own_key)
    check_last_stride(op, "own_value", own_value)
    check_block(op, query, block)
    tensors = (query, key, value, own_key, own_value)
    if not choose(op, impl, *tensors, index, count, limit=tensor_core_limit(*tensors)):
        out, log_mass = reference.gather_attention(query, key, value, index, count, scale, own_key, own_value)
        return out if block is None else by_token(out, block), log_mass
    from mage_kernels.gather_attention import triton

    return triton.gather_attention(query, key, value, index, count, scale, own_key, own_value, block or 0)
