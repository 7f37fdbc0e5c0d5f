"""One program per block; all pairs of draws are compared at once."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def fill_block_kernel(
    ids_ptr,
    token_ptr,
    confidence_ptr,
    progress_ptr,
    left_ptr,
    quotas_ptr,
    mask_id,
    num_quotas,
    threshold,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one block."""
    i_row = tl.program_id(0)
    o_place = tl.arange(0, BLOCK)
    m_place = o_place < SIZE
    o_draw = i_row * SIZE + tl.maximum(o_place - SHIFT, 0)
    b_id = tl.load(ids_ptr + i_row * SIZE + o_place, mask=m_place, other=-1)  # [BLOCK]
    b_token = tl.load(token_ptr + o_draw, mask=m_place, other=0)
    b_confidence = tl.load(confidence_ptr + o_draw, mask=m_place, other=0.0)
    is_masked = (b_id == mask_id) & m_place
    s_masked = tl.sum(is_masked.to(tl.int32), 0)
    s_first = tl.min(tl.where(is_masked, o_place, BLOCK), 0)
    s_begin = tl.where(s_masked > 0, s_first // WINDOW * WINDOW, 0)

    p_progress = progress_ptr + i_row * 3
    s_step = tl.where(tl.load(p_progress) == s_begin, tl.load(p_progress + 1), 0)
    s_quota = tl.load(quotas_ptr + tl.minimum(s_step, num_quotas - 1))
    is_open = is_masked & (o_place >= s_begin) & (o_place < s_begin + WINDOW)
    b_sure = tl.where(is_open, b_confidence, float("-inf"))
    is_better = b_sure[None, :] > b_sure[:, None]  # [mine, other]
    is_earlier = (b_sure[None, :] == b_sure[:, None]) & (o_place[None, :] < o_place[:, None])
    b_rank = tl.sum((is_better | is_earlier).to(tl.int32), 1)
    is_accepted = is_open & (b_rank < s_quota)
    if HAS_THRESHOLD:
        is_accepted = is_accepted | (is_open & (b_sure > threshold))

    tl.store(ids_ptr + i_row * SIZE + o_place, b_token, mask=is_accepted)
    tl.store(p_progress, s_begin)
    tl.store(p_progress + 1, s_step + 1)
    tl.store(p_progress + 2, tl.load(p_progress + 2) + (s_masked > 0).to(tl.int64))
    s_bad = tl.sum((is_open & (b_confidence != b_confidence)).to(tl.int32), 0)
    s_left = (s_masked - tl.sum(is_accepted.to(tl.int32), 0)).to(tl.int64)
    tl.store(left_ptr + i_row, tl.where((s_bad > 0) | (tl.load(left_ptr + i_row) < 0), -1, s_left))


def fill_block(
    ids: Tensor,
    token: Tensor,
    confidence: Tensor,
    progress: Tensor,
    left: Tensor,
    quotas: Tensor,
    mask_id: int,
    window: int,
    shift: int,
    threshold: float | None,
) -> None:
    """See `mage_kernels.fill_block.fill_block`."""
    batch, size = ids.shape
    fill_block_kernel[(batch,)](
        ids,
        token,
        confidence,
        progress,
        left,
        quotas,
        mask_id,
        len(quotas),
        0.0 if threshold is None else threshold,
        SIZE=size,
        WINDOW=window,
        SHIFT=shift,
        HAS_THRESHOLD=threshold is not None,
        BLOCK=triton.next_power_of_2(size),
        num_warps=1 if size <= 32 else 4,
    )
