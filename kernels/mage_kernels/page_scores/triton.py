"""Quest's page bounds, and the three ways to score a page; one program per some pages of one KV head."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def bounds_kernel(
    low,  # [layers * batch * heads, pages, D]
    high,
    key,
    lengths,
    added,
    num_pages,
    k_layer,
    k_batch,
    k_head,
    k_row,
    num_batch,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One page that an added key may fall into."""
    i_row = tl.program_id(1).to(tl.int64)
    i_l, i_b, i_h = i_row // (num_batch * num_heads), i_row // num_heads % num_batch, i_row % num_heads
    length = tl.load(lengths + i_b)
    i_page = tl.maximum(length - added, 0) // PAGE + tl.program_id(0)
    if i_page * PAGE < length:
        o_n = i_page * PAGE + tl.arange(0, PAGE)
        o_d = tl.arange(0, BLOCK_D)
        m_nd = (o_n < length)[:, None] & (o_d < D)[None, :]
        p_k = key + i_l * k_layer + i_b * k_batch + i_h * k_head + o_n.to(tl.int64)[:, None] * k_row + o_d[None, :]
        b_low = tl.min(tl.load(p_k, mask=m_nd, other=float("inf")).to(tl.float32), 0)
        b_high = tl.max(tl.load(p_k, mask=m_nd, other=float("-inf")).to(tl.float32), 0)
        o_out = (i_row * num_pages + i_page) * D + o_d
        tl.store(low + o_out, b_low.to(low.dtype.element_ty), mask=o_d < D)
        tl.store(high + o_out, b_high.to(high.dtype.element_ty), mask=o_d < D)


@triton.jit
def load_rows(p_q, o_m, num_rows, q_row, o_d, D: tl.constexpr):
    """Rows o_m of the queries, zeros beyond the last."""
    return tl.load(
        p_q + o_m[:, None] * q_row + o_d[None, :], mask=(o_m < num_rows)[:, None] & (o_d < D)[None, :], other=0.0
    )


@triton.jit
def halves_kernel(
    query,
    halves,  # [batch * heads, 2, D] float32: sums over the rows of max(q, 0) and of min(q, 0)
    num_rows,
    q_batch,
    q_head,
    q_row,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """All rows of one KV head."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    p_q = query + i_bh // num_heads * q_batch + i_bh % num_heads * q_head
    b_up = tl.zeros([BLOCK_D], tl.float32)
    b_down = tl.zeros([BLOCK_D], tl.float32)
    for i_m in range(0, num_rows, BLOCK_M):
        b_q = load_rows(p_q, i_m + tl.arange(0, BLOCK_M), num_rows, q_row, o_d, D).to(tl.float32)
        b_up += tl.sum(tl.maximum(b_q, 0.0), 0)
        b_down += tl.sum(tl.minimum(b_q, 0.0), 0)
    tl.store(halves + i_bh * 2 * D + o_d, b_up, mask=o_d < D)
    tl.store(halves + i_bh * 2 * D + D + o_d, b_down, mask=o_d < D)


@triton.jit
def score_kernel(
    query,
    halves,  # read where FORM is "mean"
    low,
    high,
    lengths,
    score,  # [batch * heads, pages]
    num_rows,
    num_pages,
    q_batch,
    q_head,
    q_row,
    l_batch,
    l_head,
    l_row,
    h_batch,
    h_head,
    h_row,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PAGE: tl.constexpr,
    FORM: tl.constexpr,
):
    """BLOCK_P pages of one KV head against all rows."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    m_p = (o_p < num_pages) & (o_p * PAGE < tl.load(lengths + i_b))
    m_pd = m_p[:, None] & (o_d < D)[None, :]
    p_low = low + i_b * l_batch + i_h * l_head + o_p[:, None] * l_row + o_d[None, :]
    p_high = high + i_b * h_batch + i_h * h_head + o_p[:, None] * h_row + o_d[None, :]
    b_low, b_high = tl.load(p_low, mask=m_pd, other=0.0), tl.load(p_high, mask=m_pd, other=0.0)  # [BLOCK_P, BLOCK_D]
    p_q = query + i_b * q_batch + i_h * q_head
    if FORM == "mean":
        b_up = tl.load(halves + i_bh * 2 * D + o_d, mask=o_d < D, other=0.0)
        b_down = tl.load(halves + i_bh * 2 * D + D + o_d, mask=o_d < D, other=0.0)
        b_bound = b_up[None, :] * b_high.to(tl.float32) + b_down[None, :] * b_low.to(tl.float32)
        b_score = tl.sum(b_bound, 1)
    elif FORM == "matrix":
        b_score = tl.zeros([BLOCK_P], tl.float32)
        for i_m in range(0, num_rows, BLOCK_M):
            b_q = load_rows(p_q, i_m + tl.arange(0, BLOCK_M), num_rows, q_row, o_d, D)
            b_s = tl.dot(tl.maximum(b_q, 0.0).to(b_q.dtype), tl.trans(b_high))  # [BLOCK_M, BLOCK_P]
            b_s = tl.dot(tl.minimum(b_q, 0.0).to(b_q.dtype), tl.trans(b_low), b_s)
            b_score += tl.sum(b_s, 0)
    else:
        b_score = tl.zeros([BLOCK_P], tl.float32)
        b_low, b_high = b_low.to(tl.float32), b_high.to(tl.float32)
        for i_m in range(num_rows):
            b_q = tl.load(p_q + i_m * q_row + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
            b_score += tl.sum(tl.maximum(b_q * b_low, b_q * b_high), 1)
    b_score = tl.where(m_p, b_score / num_rows, float("-inf"))
    tl.store(score + i_bh * num_pages + o_p, b_score, mask=o_p < num_pages)


@torch.library.custom_op("mage_kernels::update_pages", mutates_args=("low", "high"))
def update_pages(low: Tensor, high: Tensor, key: Tensor, lengths: Tensor, page: int, added: int) -> None:
    """See `mage_kernels.page_scores.update_pages`; every tensor with its layers."""
    layers, batch, heads, num_pages, head_dim = low.shape
    touched = min(num_pages, triton.cdiv(added, page) + 1) if added else 0
    if touched == 0:
        return
    bounds_kernel[(touched, layers * batch * heads)](
        low,
        high,
        key,
        lengths,
        added,
        num_pages,
        *key.stride()[:4],
        num_batch=batch,
        num_heads=heads,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        PAGE=page,
        num_warps=1,
    )


@update_pages.register_fake
def _(low: Tensor, high: Tensor, key: Tensor, lengths: Tensor, page: int, added: int) -> None:
    return None


@torch.library.custom_op("mage_kernels::page_scores", mutates_args=())
def page_scores(query: Tensor, low: Tensor, high: Tensor, lengths: Tensor, page: int, form: str) -> Tensor:
    """See `mage_kernels.page_scores.page_scores`."""
    batch, heads, num_rows, head_dim = query.shape
    num_pages = low.shape[-2]
    score = low.new_empty(low.shape[:-1], dtype=torch.float32)
    block_p = 32 if form == "rows" else 64
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    halves = torch.empty(batch * heads, 2, head_dim, dtype=torch.float32, device=query.device)
    if form == "mean":
        strides = query.stride()[:3]
        halves_kernel[(batch * heads,)](
            query, halves, num_rows, *strides, heads, D=head_dim, BLOCK_D=block_d, BLOCK_M=block_m
        )
    score_kernel[(triton.cdiv(num_pages, block_p), batch * heads)](
        query,
        halves,
        low,
        high,
        lengths,
        score,
        num_rows,
        num_pages,
        *query.stride()[:3],
        *low.stride()[:3],
        *high.stride()[:3],
        num_heads=heads,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_P=block_p,
        PAGE=page,
        FORM=form,
        num_warps=4,
        num_stages=2,
    )
    return score


@page_scores.register_fake
def _(query: Tensor, low: Tensor, high: Tensor, lengths: Tensor, page: int, form: str) -> Tensor:
    return low.new_empty(low.shape[:-1], dtype=torch.float32)
