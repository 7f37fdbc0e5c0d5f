"""Exact attention: flash attention of packed rows over parts of the prefix, then one kernel that merges the parts.

A program of the first kernel owns BLOCK_M rows and one part of the prefix's whole tiles; the number of parts is the
same for every length and they are cut on the device, so a captured graph stays right. The merging kernel adds what
needs masks by itself, since it is little: the keys after the last whole tile, and the block's own. So the first kernel
is one loop without conditions, and the log-sum-exp over the prefix alone falls out on the way. Where two tiles share a
mass, "whole tile" means both.
Logits live in base 2 inside (exp2 is what the hardware has); results are natural logarithms.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_kernels.exact_attention import hopper
from mage_kernels.layout import output_shape
from mage_kernels.online_softmax import LN_2, LOG2_E, attend_tile, output_row


@triton.jit
def split_kernel(
    query,
    key,
    value,
    lengths,
    part_out,  # [batch * heads, num_splits, R, D] float32
    part_mass,  # [batch * heads, num_splits, R] float32, base 2
    tile_mass,  # [batch * heads, T, R - mass_from], or unused
    qk_scale,
    num_rows,
    mass_from,
    num_tiles,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    num_splits,
    TILE_MASS: tl.constexpr,
):
    """BLOCK_M rows of one KV head against one part of its prefix's whole tiles."""
    i_m, i_split, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    tiles = tl.load(lengths + i_b) // BLOCK_N
    per_split = tl.cdiv(tiles, num_splits)
    start = tl.minimum(i_split * per_split, tiles)
    end = tl.minimum(start + per_split, tiles)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < num_rows
    m_d = o_d < D
    p_mass = part_mass + (i_bh * num_splits + i_split) * num_rows + o_m
    p_q = query + i_b * q_batch + i_h * q_head + o_m[:, None] * q_row + o_d[None, :]
    p_k = key + i_b * k_batch + i_h * k_head + (start * BLOCK_N + o_n).to(tl.int64)[:, None] * k_row + o_d[None, :]
    p_v = value + i_b * v_batch + i_h * v_head + (start * BLOCK_N + o_n).to(tl.int64)[:, None] * v_row + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    p_tile = tile_mass + (i_bh * num_tiles + start) * (num_rows - mass_from) + o_m - mass_from
    m_tile = m_m & (o_m >= mass_from)
    for _ in range(start, end):
        if BLOCK_D == D:
            b_k = tl.load(p_k)
            b_v = tl.load(p_v)
        else:
            b_k = tl.load(p_k, mask=m_d[None, :], other=0.0)
            b_v = tl.load(p_v, mask=m_d[None, :], other=0.0)
        b_acc, b_max, b_sum, b_tile = attend_tile(b_q, b_k, b_v, o_n < BLOCK_N, b_acc, b_max, b_sum, qk_scale, False)
        if TILE_MASS:
            tl.store(p_tile, (b_max + tl.log2(b_tile)) * LN_2, mask=m_tile)
            p_tile += num_rows - mass_from
        p_k += BLOCK_N * k_row
        p_v += BLOCK_N * v_row
    tl.store(p_mass, b_max + tl.log2(b_sum), mask=m_m)
    p_out = part_out + ((i_bh * num_splits + i_split) * num_rows + o_m[:, None]) * D + o_d[None, :]
    b_divisor = tl.where(b_sum > 0, b_sum, 1.0)  # an empty part: zeros, and a mass of -inf
    tl.store(p_out, b_acc / b_divisor[:, None], mask=m_m[:, None] & m_d[None, :])


@triton.jit
def merge_kernel(
    query,
    key,
    value,
    lengths,
    own_key,
    own_value,
    part_out,
    part_mass,
    tile_mass,
    out,  # [batch * heads, R, D], or [batch, POSITIONS, query heads, D]
    log_mass,  # [batch * heads, R]
    prefix_log_mass,  # [batch * heads, R - OWN_FROM]
    qk_scale,
    num_rows,
    num_tiles,
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
    num_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    OWN_FROM: tl.constexpr,
    TILE_MASS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_V channels of one KV head: the parts of the prefix, its last keys, the block's own.

    Latency is all that counts here: whatever does not depend on anything is read first, BLOCK_S parts are read at a
    time, and the channels are spread over programs.
    """
    i_m, i_v, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    m_m = o_m < num_rows
    m_first = m_m & (i_v == 0)  # what all programs of these rows know, one of them writes
    m_kept = m_first & (o_m >= OWN_FROM)
    kept = num_rows - OWN_FROM
    b_q = tl.load(
        query + i_b * q_batch + i_h * q_head + o_m[:, None] * q_row + o_d, mask=m_m[:, None] & (o_d < D), other=0.0
    )
    if OWN > 0:
        o_own = tl.arange(0, BLOCK_OWN)
        m_own = o_own < OWN
        p_own_k = own_key + i_b * ok_batch + i_h * ok_head + o_own[:, None] * ok_row + o_d
        p_own_v = own_value + i_b * ov_batch + i_h * ov_head + o_own[:, None] * ov_row + o_v
        b_own_k = tl.load(p_own_k, mask=m_own[:, None] & (o_d < D), other=0.0)
        b_own_v = tl.load(p_own_v, mask=m_own[:, None] & (o_v < D), other=0.0)
    length = tl.load(lengths + i_b)
    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        o_row = (i_bh * num_splits + o_s)[:, None] * num_rows + o_m[None, :]  # [BLOCK_S, BLOCK_M]
        m_row = (o_s < num_splits)[:, None] & m_m[None, :]
        b_mass = tl.load(part_mass + o_row, mask=m_row, other=float("-inf"))
        m_part = m_row[:, :, None] & (o_v < D)[None]
        b_part = tl.load(part_out + o_row[:, :, None] * D + o_v[None], mask=m_part, other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_mass, 0))
        b_shift = tl.where(b_new > float("-inf"), b_new, 0.0)  # -inf - -inf is NaN
        b_weight = tl.exp2(b_mass - b_shift[None, :])
        b_old = tl.exp2(b_max - b_shift)
        b_acc = b_acc * b_old[:, None] + tl.sum(b_part * b_weight[:, :, None], 0)
        b_sum = b_sum * b_old + tl.sum(b_weight, 0)
        b_max = b_new
    tail = length // BLOCK_N * BLOCK_N
    if tail < length:
        o_n = tail + tl.arange(0, BLOCK_N)
        m_n = o_n < length
        p_k = key + i_b * k_batch + i_h * k_head + o_n.to(tl.int64)[:, None] * k_row + o_d
        p_v = value + i_b * v_batch + i_h * v_head + o_n.to(tl.int64)[:, None] * v_row + o_v
        b_k = tl.load(p_k, mask=m_n[:, None] & (o_d < D), other=0.0)
        b_v = tl.load(p_v, mask=m_n[:, None] & (o_v < D), other=0.0)
        b_acc, b_max, b_sum, b_tile = attend_tile(b_q, b_k, b_v, m_n, b_acc, b_max, b_sum, qk_scale, True)
        if TILE_MASS:
            p_tile = tile_mass + (i_bh * num_tiles + tail // BLOCK_N) * kept + o_m - OWN_FROM
            tl.store(p_tile, (b_max + tl.log2(b_tile)) * LN_2, mask=m_kept)
    p_prefix = prefix_log_mass + i_bh * kept + o_m - OWN_FROM
    tl.store(p_prefix, (b_max + tl.log2(b_sum)) * LN_2, mask=m_kept)
    if OWN > 0:
        b_all, b_top, b_total, _ = attend_tile(b_q, b_own_k, b_own_v, m_own, b_acc, b_max, b_sum, qk_scale, True)
        m_see = o_m >= OWN_FROM
        b_acc = tl.where(m_see[:, None], b_all, b_acc)
        b_max, b_sum = tl.where(m_see, b_top, b_max), tl.where(m_see, b_total, b_sum)
    b_divisor = tl.where(b_sum > 0, b_sum, 1.0)
    p_out = out + output_row(i_b, i_h, o_m, num_heads, num_rows, POSITIONS)[:, None] * D + o_v
    tl.store(p_out, (b_acc / b_divisor[:, None]).to(out.dtype.element_ty), mask=m_m[:, None] & (o_v < D))
    tl.store(log_mass + i_bh * num_rows + o_m, (b_max + tl.log2(b_sum)) * LN_2, mask=m_first)


class Plan(NamedTuple):
    """How the prefix pass is cut into programs and compiled."""

    block_m: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int
    is_hopper: bool = False
    """Whether the warp-specialised kernel of `hopper.py` does it."""


def make_plan(query: Tensor, key: Tensor, value: Tensor, tile: int) -> Plan:
    """The plan for these tensors on their device, with tiles that share masses of `tile` keys where that is not 0."""
    batch, heads, num_rows, head_dim = query.shape
    is_hopper = hopper.why_not(query, key, value, tile) is None
    if is_hopper:
        block_m, block_n, num_stages = hopper.choose_tiles(batch * heads, num_rows, tile)
        num_warps = 4
    else:
        block_m = min(128, max(16, triton.next_power_of_2(num_rows)))
        block_n, num_warps, num_stages = tile or 64, 8 if block_m >= 128 else 4, 3 if head_dim <= 128 else 2
    min_part = MIN_PART
    if is_hopper and num_rows <= 128 and batch * heads >= 8 and key.shape[-2] <= SHORT:
        # 1 % faster than the tiles of long prefixes for SDAR-8B at 8K, batch 1, and 5 % at batch 8
        # (docs/performance.md); longer prefixes were not measured. With masses, of two tiles, it is not slower.
        block_n, num_stages, min_part = 64, 3, 2 * MIN_PART
    columns = batch * heads * triton.cdiv(num_rows, block_m)
    num_splits = choose_splits(columns, key.shape[-2] // min_part, num_slots(query))
    return Plan(block_m, block_n, num_splits, num_warps, num_stages, is_hopper)


MIN_PART = 512
"""Keys that a part should have at least: merging more parts costs more than their programs save (measured at 8K)."""
SHORT = 8192 + 64
"""Slots of a cache of 8K and a block."""


def choose_splits(columns: int, most: int, slots: int) -> int:
    """Parts of the prefix: as few as fill the last wave of `slots` programs well, 1 to `most`."""
    best, best_fill = 1, 0.0
    for splits in range(1, min(most, slots) + 1):
        programs = columns * splits
        fill = programs / (triton.cdiv(programs, slots) * slots)
        if fill > best_fill + 0.04:  # more parts are more to merge: they must fill noticeably better
            best, best_fill = splits, fill
    return best


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    own_key: Tensor | None,
    own_value: Tensor | None,
    own_from: int,
    tile: int | None,
    masses: tuple[Tensor, Tensor] | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `mage_kernels.exact_attention.exact_attention`."""
    if masses is None:
        batch, heads, num_rows, _ = query.shape
        num_tiles = -(-key.shape[-2] // tile) if tile else 0
        floats: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        kept = num_rows - own_from
        masses = torch.empty(batch, heads, num_tiles, kept, **floats), torch.empty(batch, heads, kept, **floats)
    own = (own_key, own_value, own_from)
    out, log_mass = _op(query, key, value, lengths, scale, *own, tile or 0, *masses, block)
    return out, log_mass, masses[1], masses[0] if tile else None


@torch.library.custom_op("mage_kernels::exact_attention", mutates_args=("tile_mass", "prefix_log_mass"))
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    own_key: Tensor | None,
    own_value: Tensor | None,
    own_from: int,
    tile: int,
    tile_mass: Tensor,
    prefix_log_mass: Tensor,
    block: int,
) -> tuple[Tensor, Tensor]:
    plan, own = make_plan(query, key, value, tile), (own_key, own_value, own_from)
    return launch(plan, query, key, value, lengths, scale, *own, tile, tile_mass, prefix_log_mass, block)


@_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    own_key: Tensor | None,
    own_value: Tensor | None,
    own_from: int,
    tile: int,
    tile_mass: Tensor,
    prefix_log_mass: Tensor,
    block: int,
) -> tuple[Tensor, Tensor]:
    return _outputs(query, block)


def _outputs(query: Tensor, block: int) -> tuple[Tensor, Tensor]:
    out = torch.empty(output_shape(query, block), dtype=query.dtype, device=query.device)
    return out, torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)


def num_slots(tensor: Tensor) -> int:
    """Programs that run at a time, one per multiprocessor; a handful in the interpreter."""
    if tensor.device.type != "cuda":
        return 6
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def launch(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    own_key: Tensor | None,
    own_value: Tensor | None,
    own_from: int,
    tile: int,
    tile_mass: Tensor,
    prefix_log_mass: Tensor,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Both kernels under a plan, whose tiles share masses of `tile` keys; `block` puts `out` in order of tokens."""
    masses_of = tile // plan.block_n
    assert tile == masses_of * plan.block_n and masses_of <= (2 if plan.is_hopper else 1)
    batch, heads, num_rows, head_dim = query.shape
    out, log_mass = _outputs(query, block)
    parts = (batch * heads, plan.num_splits, num_rows)
    part_out = torch.empty(*parts, head_dim, dtype=torch.float32, device=query.device)
    part_mass = torch.empty(parts, dtype=torch.float32, device=query.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    inputs = (query, key, value, lengths, part_out, part_mass, tile_mass, scale * LOG2_E.value)
    if plan.is_hopper:
        from mage_kernels.exact_attention.hopper_kernel import launch as launch_hopper  # needs Gluon

        launch_hopper(
            *inputs,
            groups=plan.block_m // 64,
            block_n=plan.block_n,
            num_splits=plan.num_splits,
            stages=plan.num_stages,
            masses_of=masses_of,
            mass_from=own_from,
        )
    else:
        split_kernel[(triton.cdiv(num_rows, plan.block_m), plan.num_splits, batch * heads)](
            *inputs,
            num_rows,
            own_from,
            tile_mass.shape[2],
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            num_heads=heads,
            num_splits=plan.num_splits,
            D=head_dim,
            BLOCK_D=block_d,
            BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n,
            TILE_MASS=tile > 0,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )
    own = 0 if own_key is None else own_key.shape[-2]
    own_key, own_value = (query, query) if own_key is None or own_value is None else (own_key, own_value)
    block_v = min(32, block_d)
    merge_kernel[(triton.cdiv(num_rows, 16), block_d // block_v, batch * heads)](
        query,
        key,
        value,
        lengths,
        own_key,
        own_value,
        part_out,
        part_mass,
        tile_mass,
        out,
        log_mass,
        prefix_log_mass,
        scale * LOG2_E.value,
        num_rows,
        tile_mass.shape[2],
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *own_key.stride()[:3],
        *own_value.stride()[:3],
        num_heads=heads,
        num_splits=plan.num_splits,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        BLOCK_M=16,
        BLOCK_N=tile or plan.block_n,
        BLOCK_S=min(16, triton.next_power_of_2(plan.num_splits)),
        OWN=own,
        BLOCK_OWN=max(16, triton.next_power_of_2(own)),
        OWN_FROM=own_from,
        TILE_MASS=tile > 0,
        POSITIONS=block,
        num_warps=4,
        num_stages=2,
    )
    return out, log_mass
