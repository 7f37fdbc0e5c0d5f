"""Attention over a few keys in one launch: each program owns BLOCK_M rows and walks all their keys, or a part of them.

Where programs are too few to fill the GPU, the keys of a row are split over several; the last one to arrive merges what
they found, in their order. The same kernel serves `gather_attention`: with GATHER, the front keys are read from the
cache through a list.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_kernels.few_rows.triton import FULL_WAVE
from mage_kernels.layout import output_shape
from mage_kernels.online_softmax import LN_2, LOG2_E, attend_tile, output_row
from mage_kernels.overlap import launch_options
from mage_kernels.overlap.triton import ask, held, let_next_start, wait

LOWEST = tl.constexpr(-1e30)
"""Where a maximum begins: below every logit, and finite, so that a tile may have no key at all."""


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
    parts_out,  # [tiles of rows, PARTS, BLOCK_M, BLOCK_D], used where PARTS > 1
    parts_mass,  # [tiles of rows, PARTS, 2, BLOCK_M]: maximum, base 2, and sum relative to it
    arrivals,  # [tiles of rows], zero
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
    BLOCK_OWN: tl.constexpr,
    GATHER: tl.constexpr,
    POSITIONS: tl.constexpr,
    PARTS: tl.constexpr,
    SHARE: tl.constexpr,
    IS_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_M rows of one KV head, and a part of its keys.

    With IS_TILE, a part is one tile of the front keys, and the last one the block's own. No kernel of a step writes the
    front keys, so they are read before the wait.
    """
    i_m, i_bh, i_part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    p_k = key + i_b * k_batch + i_h * k_head
    p_v = value + i_b * v_batch + i_h * v_head
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if IS_TILE:
        o_n = i_part * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = (o_n < tl.load(count + i_bh)) & (i_part < PARTS - 1)
        m_nd = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_n[:, None] * k_row + o_d[None, :], mask=m_nd, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(p_v + o_n[:, None] * v_row + o_d[None, :], mask=m_nd, other=0.0)
    elif OVERLAP and not GATHER:  # the programs of a KV head share its keys, and the asking for them
        o_share = tl.minimum((i_m * PARTS + i_part) * SHARE + tl.arange(0, SHARE), tl.maximum(k - 1, 0))
        BYTES: tl.constexpr = (D * key.dtype.element_ty.primitive_bitwidth + 127) // 128 * 16
        ask(p_k + o_share * k_row, BYTES)
        ask(p_v + o_share * v_row, BYTES)
    wait(OVERLAP)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_rows
    m_md = m_m[:, None] & m_d[None, :]
    p_q = query + i_b * q_batch + i_h * q_head + o_m[:, None] * q_row + o_d[None, :]
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    p_own_k = own_key + i_b * ok_batch + i_h * ok_head
    p_own_v = own_value + i_b * ov_batch + i_h * ov_head
    if IS_TILE:
        if i_part < PARTS - 1:
            b_q = tl.load(p_q, mask=m_md, other=0.0)
            b_acc, b_max, b_sum, _ = attend_tile(b_q, b_k, b_v, m_n, b_acc, b_max, b_sum, qk_scale, True)
        else:
            o_own = tl.arange(0, BLOCK_OWN)
            p_key = p_own_k + o_own[:, None] * ok_row + o_d[None, :]
            p_value = p_own_v + o_own[:, None] * ov_row + o_d[None, :]
            m_own = o_own < OWN
            b_q, b_own_k, b_own_v = load_at_once(p_q, p_key, p_value, m_md, m_own[:, None] & m_d[None, :], OVERLAP)
            b_acc, b_max, b_sum, _ = attend_tile(b_q, b_own_k, b_own_v, m_own, b_acc, b_max, b_sum, qk_scale, True)
    else:
        b_q = tl.load(p_q, mask=m_md, other=0.0)
        num_keys = tl.load(count + i_bh)
        total = num_keys + OWN  # one loop over the front keys and the block's own: one pipeline of loads
        first, last = 0, total
        if PARTS > 1:
            part_size = tl.cdiv(tl.cdiv(total, BLOCK_N), PARTS) * BLOCK_N
            first = i_part * part_size
            last = tl.minimum(total, first + part_size)
        for start in range(first, last, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            m_n, m_front = o_n < total, o_n < num_keys
            if GATHER:
                o_row = tl.load(index + i_bh * k + o_n, mask=m_front, other=0).to(tl.int64)
                o_own = o_n - num_keys
                p_key = tl.where(m_front, p_k + o_row * k_row, p_own_k + o_own * ok_row)[:, None] + o_d[None, :]
                p_value = tl.where(m_front, p_v + o_row * v_row, p_own_v + o_own * ov_row)[:, None] + o_d[None, :]
            else:  # the block's own lie k slots behind the first
                o_row = tl.where(m_front, o_n, o_n - num_keys + k)[:, None]
                p_key = p_k + o_row * k_row + o_d[None, :]
                p_value = p_v + o_row * v_row + o_d[None, :]
            m_nd = m_n[:, None] & m_d[None, :]
            b_k = tl.load(p_key, mask=m_nd, other=0.0)  # [BLOCK_N, BLOCK_D]
            b_v = tl.load(p_value, mask=m_nd, other=0.0)
            b_acc, b_max, b_sum, _ = attend_tile(b_q, b_k, b_v, m_n, b_acc, b_max, b_sum, qk_scale, True)
    let_next_start(OVERLAP)
    i_tile = i_bh * tl.num_programs(0) + i_m
    is_last = True
    if PARTS > 1:
        is_last = has_all_parts(b_acc, b_max, b_sum, parts_out, parts_mass, arrivals, i_tile, i_part, PARTS)
    if is_last:
        if PARTS > 1:
            tl.store(arrivals + i_tile, 0)  # the next launch counts from 0 again
            b_acc, b_max, b_sum = merge_parts(parts_out, parts_mass, i_tile, o_d, PARTS, BLOCK_M, BLOCK_D)
        b_divisor = tl.where(b_sum > 0, b_sum, 1.0)
        tl.store(log_mass + i_bh * num_rows + o_m, (b_max + tl.log2(b_sum)) * LN_2, mask=m_m)
        p_out = out + output_row(i_b, i_h, o_m, num_heads, num_rows, POSITIONS)[:, None] * D + o_d[None, :]
        tl.store(p_out, (b_acc / b_divisor[:, None]).to(out.dtype.element_ty), mask=m_md)


@triton.jit
def load_at_once(p_q, p_k, p_v, m_q, m_kv, OVERLAP: tl.constexpr):
    """Queries, keys and values: all are asked for before the first is waited for."""
    b_k = tl.load(p_k, mask=m_kv, other=0.0)
    b_v = tl.load(p_v, mask=m_kv, other=0.0)
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    return held(b_q, OVERLAP), held(b_k, OVERLAP), held(b_v, OVERLAP)


@triton.jit
def has_all_parts(b_acc, b_max, b_sum, parts_out, parts_mass, arrivals, i_tile, i_part, PARTS: tl.constexpr):
    """Leaves the softmax state of a part where the tile's last program finds it; whether this is that program."""
    BLOCK_M: tl.constexpr = b_acc.shape[0]
    BLOCK_D: tl.constexpr = b_acc.shape[1]
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    i_all = i_tile * PARTS + i_part
    p_mass = parts_mass + i_all * 2 * BLOCK_M + o_m
    tl.store(parts_out + (i_all * BLOCK_M + o_m)[:, None] * BLOCK_D + o_d[None, :], b_acc)
    tl.store(p_mass, b_max)
    tl.store(p_mass + BLOCK_M, b_sum)
    tl.debug_barrier()  # all of the part is on its way before any thread says so
    return tl.atomic_add(arrivals + i_tile, 1, sem="acq_rel") == PARTS - 1


@triton.jit
def merge_parts(
    parts_out,
    parts_mass,
    i_tile,
    o_d,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The softmax state of a tile's rows after all their keys."""
    o_m, i_first = tl.arange(0, BLOCK_M), i_tile * PARTS
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    for i_part in tl.static_range(PARTS):
        p_mass = parts_mass + (i_first + i_part) * 2 * BLOCK_M + o_m
        b_max = tl.maximum(b_max, tl.load(p_mass, cache_modifier=".cg"))
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for i_part in tl.static_range(PARTS):
        p_mass = parts_mass + (i_first + i_part) * 2 * BLOCK_M + o_m
        b_factor = tl.exp2(tl.load(p_mass, cache_modifier=".cg") - b_max)
        b_sum += b_factor * tl.load(p_mass + BLOCK_M, cache_modifier=".cg")
        p_out = parts_out + ((i_first + i_part) * BLOCK_M + o_m)[:, None] * BLOCK_D + o_d[None, :]
        b_acc += b_factor[:, None] * tl.load(p_out, cache_modifier=".cg")
    return b_acc, b_max, b_sum


class Plan(NamedTuple):
    """Tile sizes and compile options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1
    """Programs that share the keys of a row."""
    is_tile: bool = False
    """A part is a tile of front keys, and the last one the block's own."""


def make_plan(batch_heads: int, num_rows: int, head_dim: int, can_split: bool = False, front: int = 0) -> Plan:
    """Few rows per program, so that few heads still make many programs; more where 16 would not fit in one wave.

    `front` keys may be split into tiles that are read before the wait, where all programs find room at a time.
    """
    stages = 3 if head_dim <= 128 else 2
    programs = batch_heads * triton.cdiv(num_rows, 16)
    if programs > ONE_WAVE and num_rows >= 64:
        return Plan(64, 64, 4, stages)
    parts = triton.cdiv(front, TILE) + 1
    if can_split and 1 < parts <= MOST_PARTS and head_dim <= 128 and programs * parts <= THREE_EACH:
        return Plan(16, TILE, 4, 1, parts, is_tile=True)
    parts = min(MOST_PARTS, FULL_WAVE // programs) if can_split else 1
    return Plan(16, 64, 4, stages, max(1, parts))


TILE = 128
"""Front keys that a program reads before its wait: as many as registers hold, of at most 128 numbers each."""

MOST_PARTS = 5
"""Merging more costs more than their programs save; 512 keys are four tiles, and the block's own one more."""

THREE_EACH = 396
"""Programs with a tile that a large GPU runs at a time: their registers leave room for three on a multiprocessor."""

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
    arrivals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the front keys (listed, or the first ones) and the block's own, under a plan.

    A plan of several parts needs `arrivals`, see `mage_kernels.few_rows.new_arrivals`.
    """
    batch, heads, num_rows, head_dim = query.shape
    out, log_mass = outputs(query, block)
    tiles, width = triton.cdiv(num_rows, plan.block_m), max(16, triton.next_power_of_2(head_dim))
    parts_out = parts_mass = log_mass
    front = key.shape[-2] - own_key.shape[-2] if index is None else index.shape[-1]
    if plan.parts > 1:
        assert arrivals is not None and tiles * batch * heads <= arrivals.numel()
        rows = tiles * batch * heads * plan.parts * plan.block_m
        parts_out, parts_mass = log_mass.new_empty(rows, width), log_mass.new_empty(2, rows)
    how = launch_options()
    attend_kernel[(tiles, batch * heads, plan.parts)](
        query,
        key,
        value,
        own_key,
        own_value,
        count if index is None else index,
        count,
        out,
        log_mass,
        parts_out,
        parts_mass,
        count if arrivals is None else arrivals,
        scale * LOG2_E.value,
        num_rows,
        front,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *own_key.stride()[:3],
        *own_value.stride()[:3],
        num_heads=heads,
        D=head_dim,
        BLOCK_D=width,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        OWN=own_key.shape[-2],
        BLOCK_OWN=max(16, triton.next_power_of_2(own_key.shape[-2])),
        GATHER=index is not None,
        POSITIONS=block,
        PARTS=plan.parts,
        IS_TILE=plan.is_tile,
        SHARE=triton.next_power_of_2(max(1, triton.cdiv(front, tiles * plan.parts))) if how["OVERLAP"] else 1,
        **how,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out, log_mass


def outputs(query: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, log_mass)."""
    return query.new_empty(output_shape(query, block)), query.new_empty(query.shape[:-1], dtype=torch.float32)


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    count: Tensor,
    scale: float,
    own: int,
    block: int,
    arrivals: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `mage_kernels.small_attention.small_attention`; split where there is something to count arrivals with."""
    batch, heads, num_rows, head_dim = query.shape
    front = key.shape[-2] - own
    plan = make_plan(batch * heads, num_rows, head_dim, arrivals is not None, front)
    own_key, own_value = key[:, :, front:], value[:, :, front:]
    return launch(plan, query, key, value, own_key, own_value, None, count, scale, block, arrivals)


@torch.library.custom_op("mage_kernels::small_attention", mutates_args=())
def small_attention(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor, scale: float, own: int, block: int
) -> tuple[Tensor, Tensor]:
    """The same, in no parts: a custom operation may not count in a tensor that it does not declare."""
    return split_attention(query, key, value, count, scale, own, block, None)


@small_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor, scale: float, own: int, block: int
) -> tuple[Tensor, Tensor]:
    return outputs(query, block)
