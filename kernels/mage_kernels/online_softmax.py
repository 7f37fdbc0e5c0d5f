"""One step of flash attention, shared by the attention kernels; imports Triton, so only `triton.py` files import it."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_tile(
    b_q,  # [BLOCK_M, BLOCK_D]
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_D], finite where not meant
    m_n,  # [BLOCK_N] which keys are meant, at least one; read where MASKED
    b_acc,  # [BLOCK_M, BLOCK_D]
    b_max,  # [BLOCK_M], base 2
    b_sum,  # [BLOCK_M]
    qk_scale,  # factor on the logits times log2(e), positive
    MASKED: tl.constexpr,
):
    """The softmax state after one more tile, and each row's sum over that tile alone, relative to the new maximum."""
    b_s = tl.dot(b_q, tl.trans(b_k))  # [BLOCK_M, BLOCK_N]
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)
    b_p = tl.exp2(b_s * qk_scale - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_tile = tl.sum(b_p, 1)
    b_sum = b_sum * b_old + b_tile
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None])
    return b_acc, b_new, b_sum, b_tile


@triton.jit
def output_row(i_b, i_h, o_m, num_heads, num_rows, POSITIONS: tl.constexpr):
    """Where the output of packed row o_m goes, in rows of D: as packed, or of POSITIONS tokens each query head's."""
    if POSITIONS == 0:
        o_row = (i_b * num_heads + i_h) * num_rows + o_m
    else:
        group = num_rows // POSITIONS
        o_row = ((i_b * POSITIONS + o_m % POSITIONS) * num_heads + i_h) * group + o_m // POSITIONS
    return o_row
