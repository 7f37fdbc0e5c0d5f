"""Attention over a few keys in one launch: each program owns BLOCK_M rows and walks all their keys.

The same kernel serves `gather_attention`: with GATHER, the front keys are read from the cache through a list.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_kernels.layout import output_shape
from mage_kernels.online_softmax import LN_2, LOG2_E, attend_tile, output_row


@triton.jit
def attend_kernel(
    query,
    key,
    value,
    own_key,
    own_value,
    index,  # [batch * heads, k], read where GATHER
    count,  # [batch * heads]
    out,  # [batch * heads, R, D], or [batch, POSITIONS, query heads, D]
    log_mass,  # [batch * heads, R]
    qk_scale,
    num_rows,
    k,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    ok_batch,
    ok_head,
    ok_row,
    ov_batch,
    ov_head,
    ov_row,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN,
    GATHER: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """BLOCK_M rows of one KV head."""
    i_m, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    num_keys = tl.load(count + i_bh)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < num_rows, o_d < D
    m_md = m_m[:, None] & m_d[None, :]
    b_q = tl.load(query + i_b * q_batch + i_h * q_head + o_m[:, None] * q_row + o_d[None, :], mask=m_md, other=0.0)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    p_k = key + i_b * k_batch + i_h * k_head
    p_v = value + i_b * v_batch + i_h * v_head
    p_own_k = own_key + i_b * ok_batch + i_h * ok_head
    p_own_v = own_value + i_b * ov_batch + i_h * ov_head
    total = num_keys + OWN  # one loop over the front keys and the block's own: one pipeline of loads
    for start in range(0, total, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        o_own = o_n - num_keys
        m_n, m_front = o_n < total, o_n < num_keys
        o_row = tl.load(index + i_bh * k + o_n, mask=m_front, other=0).to(tl.int64) if GATHER else o_n
        p_key = tl.where(m_front, p_k + o_row * k_row, p_own_k + o_own * ok_row)[:, None] + o_d[None, :]
        p_value = tl.where(m_front, p_v + o_row * v_row, p_own_v + o_own * ov_row)[:, None] + o_d[None, :]
        m_nd = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_key, mask=m_nd, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(p_value, mask=m_nd, other=0.0)
        b_acc, b_max, b_sum, _ = attend_tile(b_q, b_k, b_v, m_n, b_acc, b_max, b_sum, qk_scale, True)
    b_divisor = tl.where(b_sum > 0, b_sum, 1.0)
    tl.store(log_mass + i_bh * num_rows + o_m, (b_max + tl.log2(b_sum)) * LN_2, mask=m_m)
    p_out = out + output_row(i_b, i_h, o_m, num_heads, num_rows, POSITIONS)[:, None] * D + o_d[None, :]
    tl.store(p_out, (b_acc / b_divisor[:, None]).to(out.dtype.element_ty), mask=m_md)


class Plan(NamedTuple):
    """Tile sizes and compile options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def make_plan(batch_heads: int, num_rows: int, head_dim: int) -> Plan:
    """Few rows per program, so that few heads still make many programs; more where 16 would not fit in one wave."""
    stages = 3 if head_dim <= 128 else 2
    if batch_heads * triton.cdiv(num_rows, 16) > ONE_WAVE and num_rows >= 64:
        return Plan(64, 64, 4, stages)
    return Plan(16, 64, 4, stages)


ONE_WAVE = 264
"""Programs of 16 rows that a large GPU runs at a time: two on each of 132 multiprocessors."""


def launch(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    index: Tensor | None,
    count: Tensor,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Attention over the front keys (listed, or the first ones) and the block's own, under a plan."""
    batch, heads, num_rows, head_dim = query.shape
    out, log_mass = outputs(query, block)
    attend_kernel[(triton.cdiv(num_rows, plan.block_m), batch * heads)](
        query,
        key,
        value,
        own_key,
        own_value,
        count if index is None else index,
        count,
        out,
        log_mass,
        scale * LOG2_E.value,
        num_rows,
        0 if index is None else index.shape[-1],
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *own_key.stride()[:3],
        *own_value.stride()[:3],
        num_heads=heads,
        D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        OWN=own_key.shape[-2],
        GATHER=index is not None,
        POSITIONS=block,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out, log_mass


def outputs(query: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, log_mass)."""
    return query.new_empty(output_shape(query, block)), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("mage_kernels::small_attention", mutates_args=())
def small_attention(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor, scale: float, own: int, block: int
) -> tuple[Tensor, Tensor]:
    """See `mage_kernels.small_attention.small_attention`."""
    batch, heads, num_rows, head_dim = query.shape
    front = key.shape[-2] - own
    plan = make_plan(batch * heads, num_rows, head_dim)
    return launch(plan, query, key, value, key[:, :, front:], value[:, :, front:], None, count, scale, block)


@small_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor, scale: float, own: int, block: int
) -> tuple[Tensor, Tensor]:
    return outputs(query, block)
