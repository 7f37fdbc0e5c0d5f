"""Attention of a block's packed rows over its few compacted keys and the block itself: the sparse step.

The keys lie in one small contiguous buffer (`compact`): chosen ones in front, the block's own in the last B slots.
One launch, made for low latency.
"""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose, tensor_core_limit
from mage_kernels.layout import by_token, check_block, check_counts, check_rows
from mage_kernels.small_attention import reference


def small_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    count: Tensor,
    scale: float,
    *,
    own: int,
    block: int | None = None,
    arrivals: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over slots 0 to count - 1 and the last `own` slots.

    Args:
        query: (batch, KV heads, R, D) packed rows, any R; bf16 or fp16 for Triton, D at most 256.
        key, value: (batch, KV heads, k + own, D), same dtype; the last dimension contiguous.
        count: (batch, KV heads) int32 valid keys in front, 0 to k, on the device.
        scale: factor on the logits.
        own: the block's keys at the end, 0 or more, always visible.
        block: positions of a block, to get `out` token by token.
        arrivals: see `few_rows.new_arrivals`; with it, the keys of few heads are split over more programs.

    Returns:
        out: (batch, KV heads, R, D), or (batch * block, query heads * D), in the queries' dtype; 0 for a row that sees
            nothing.
        log_mass: (batch, KV heads, R) float32 log-sum-exp; -inf for a row that sees nothing.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: `impl="triton"` cannot run here.
    """
    op = "small_attention"
    check_rows(op, query, key, value)
    check_counts(op, "count", count, tuple(query.shape[:2]))
    check_block(op, query, block)
    if not 0 <= own <= key.shape[-2]:
        raise ValueError(f"{op}: own {own} is not between 0 and the {key.shape[-2]} slots")
    if not choose(op, impl, query, key, value, count, limit=tensor_core_limit(query, key, value)):
        out, log_mass = reference.small_attention(query, key, value, count, scale, own)
        return out if block is None else by_token(out, block), log_mass
    from mage_kernels.small_attention import triton

    if arrivals is not None:
        return triton.split_attention(query, key, value, count, scale, own, block or 0, arrivals)
    return triton.small_attention(query, key, value, count, scale, own, block or 0)
