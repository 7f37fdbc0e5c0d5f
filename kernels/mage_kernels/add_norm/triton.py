"""One program per row, the whole row in registers."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_norm_kernel(
    residual_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    eps,
    num_rows,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one row: adds, writes the sum back, normalises it."""
    i_row = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BLOCK)
    m_col = o_col < HIDDEN
    o_row = i_row * HIDDEN + o_col
    b_sum = tl.load(residual_ptr + o_row, mask=m_col, other=0.0)  # [BLOCK]
    if PARTS > 0:
        # Rounded to the stream's precision where the unfused code does: the delta, and its sum with the stream.
        b_delta = tl.zeros([BLOCK], tl.float32)
        for i_part in tl.static_range(PARTS):
            b_delta += tl.load(delta_ptr + i_part * num_rows * HIDDEN + o_row, mask=m_col, other=0.0).to(tl.float32)
        b_delta = b_delta.to(residual_ptr.dtype.element_ty)
        b_sum = (b_sum.to(tl.float32) + b_delta.to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + o_row, b_sum, mask=m_col)
    b_wide = b_sum.to(tl.float32)
    s_scale = tl.rsqrt(tl.sum(b_wide * b_wide, 0) / HIDDEN + eps)
    b_normed = (b_wide * s_scale).to(out_ptr.dtype.element_ty)
    b_weight = tl.load(weight_ptr + o_col, mask=m_col, other=0.0)
    tl.store(out_ptr + o_row, (b_normed.to(tl.float32) * b_weight.to(tl.float32)), mask=m_col)


def add_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `mage_kernels.add_norm.add_norm`."""
    rows, hidden = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(hidden)
    add_norm_kernel[(rows,)](
        residual,
        residual if delta is None else delta,
        weight,
        out,
        eps,
        rows,
        HIDDEN=hidden,
        PARTS=0 if delta is None else delta.shape[0],
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out
