"""Key scores: column sums of exp(S - log mass) over all packed rows, one program per tile of keys.

A program reads its keys once and runs over all R rows, so no program adds to another's sums: the result does not depend
on timing. Grids follow the capacity; programs beyond a row's length write zeros and leave.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_kernels.online_softmax import LOG2_E


@triton.jit
def probability_kernel(
    query,
    key,
    log_mass,  # [layers * batch * heads, R]
    lengths,
    tiles,  # [layers * batch * heads, S], or unused
    count,  # [layers * batch * heads], or unused
    score,  # [layers * batch * heads, size]
    qk_scale,
    num_rows,
    size,
    q_layer,
    q_batch,
    q_head,
    q_row,
    k_layer,
    k_batch,
    k_head,
    k_row,
    num_batch,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHORTLIST: tl.constexpr,
):
    """One tile of keys of one KV head: tile number i_tile, or entry i_tile of the shortlist."""
    i_tile, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_l, i_b, i_h = i_row // (num_batch * num_heads), i_row // num_heads % num_batch, i_row % num_heads
    length = tl.load(lengths + i_b)
    o_n = tl.arange(0, BLOCK_N)
    o_slot = i_tile * BLOCK_N + o_n
    start = i_tile * BLOCK_N
    if SHORTLIST:
        is_meant = i_tile < tl.load(count + i_row)
        start = tl.load(tiles + i_row * (size // BLOCK_N) + i_tile, mask=is_meant, other=0) * BLOCK_N
        length = tl.where(is_meant, length, 0)
    m_n = start + o_n < length
    b_score = tl.zeros([BLOCK_N], tl.float32)
    if start < length:
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        o_key = (start + o_n).to(tl.int64)
        p_k = key + i_l * k_layer + i_b * k_batch + i_h * k_head + o_key[:, None] * k_row + o_d[None, :]
        b_k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        p_q = query + i_l * q_layer + i_b * q_batch + i_h * q_head + o_d[None, :]
        b_sum = tl.zeros(
            [BLOCK_M, BLOCK_N], tl.float32
        )  # summed over rows at the end: a reduction costs more than this
        for i_m in range(0, num_rows, BLOCK_M):
            o_m = i_m + tl.arange(0, BLOCK_M)
            m_m = o_m < num_rows
            b_q = tl.load(p_q + o_m[:, None] * q_row, mask=m_m[:, None] & m_d[None, :], other=0.0)
            b_mass = tl.load(log_mass + i_row * num_rows + o_m, mask=m_m, other=float("inf")) * LOG2_E
            b_s = tl.dot(b_q, tl.trans(b_k))  # [BLOCK_M, BLOCK_N]
            b_sum += tl.exp2(b_s * qk_scale - b_mass[:, None])
        b_score = tl.sum(b_sum, 0)
    b_score = tl.where(m_n, b_score / num_rows, 0.0)
    tl.store(score + i_row * size + o_slot, b_score, mask=o_slot < size)


@triton.jit
def mass_kernel(
    tile_log_mass,  # [layers * batch * heads, T, R]
    log_mass,
    lengths,
    mass,  # [layers * batch * heads, T]
    num_tiles,
    num_rows,
    tile,
    num_batch,
    num_heads,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Some tiles of one KV head."""
    i_row = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t * tile < tl.load(lengths + i_row // num_heads % num_batch)
    b_mass = tl.zeros([BLOCK_T], tl.float32)
    for i_r in range(0, num_rows, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < num_rows
        b_all = tl.load(log_mass + i_row * num_rows + o_r, mask=m_r, other=0.0)
        p_tile = tile_log_mass + (i_row * num_tiles + o_t[:, None]) * num_rows + o_r[None, :]
        b_tile = tl.load(p_tile, mask=m_t[:, None] & m_r[None, :], other=float("-inf"))  # [BLOCK_T, BLOCK_R]
        b_mass += tl.sum(tl.exp2((b_tile - b_all[None, :]) * LOG2_E), 1)
    tl.store(mass + i_row * num_tiles + o_t, tl.where(m_t, b_mass / num_rows, 0.0), mask=o_t < num_tiles)


@triton.jit
def logit_kernel(
    mean_query,  # [layers * batch * heads, D] float32
    key,
    lengths,
    score,  # [layers * batch * heads, size]
    scale,
    size,
    k_layer,
    k_batch,
    k_head,
    k_row,
    num_batch,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of keys of one KV head."""
    i_row = tl.program_id(1).to(tl.int64)
    i_l, i_b, i_h = i_row // (num_batch * num_heads), i_row // num_heads % num_batch, i_row % num_heads
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < tl.load(lengths + i_b), o_d < D
    b_q = tl.load(mean_query + i_row * D + o_d, mask=m_d, other=0.0)
    o_key = o_n.to(tl.int64)
    p_k = key + i_l * k_layer + i_b * k_batch + i_h * k_head + o_key[:, None] * k_row + o_d[None, :]
    b_k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    tl.store(score + i_row * size + o_n, tl.sum(b_k * b_q[None, :], 1) * scale, mask=o_n < size)


def mean_probability(query: Tensor, key: Tensor, log_mass: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See `mage_kernels.key_scores.mean_probability`; every tensor with its layers."""
    return _probability(query, key, log_mass, lengths, scale, None, None, 128)


def tile_probability(
    query: Tensor,
    key: Tensor,
    log_mass: Tensor,
    lengths: Tensor,
    scale: float,
    tiles: Tensor,
    count: Tensor,
    tile: int,
) -> Tensor:
    """See `mage_kernels.key_scores.tile_probability`; every tensor with its layers."""
    return _probability(query, key, log_mass, lengths, scale, tiles, count, tile)


@torch.library.custom_op("mage_kernels::probability", mutates_args=())
def _probability(
    query: Tensor,
    key: Tensor,
    log_mass: Tensor,
    lengths: Tensor,
    scale: float,
    tiles: Tensor | None,
    count: Tensor | None,
    tile: int,
) -> Tensor:
    score = _score_of(query, key, tiles, tile)
    layers, batch, heads, num_rows, head_dim = query.shape
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    grid = (triton.cdiv(score.shape[-1], tile), layers * batch * heads)
    probability_kernel[grid](
        query,
        key,
        log_mass,
        lengths,
        lengths if tiles is None else tiles,
        lengths if count is None else count,
        score,
        scale * LOG2_E.value,
        num_rows,
        score.shape[-1],
        *query.stride()[:4],
        *key.stride()[:4],
        num_batch=batch,
        num_heads=heads,
        D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=block_m,
        BLOCK_N=tile,
        SHORTLIST=tiles is not None,
        num_warps=4,
        num_stages=3,
    )
    return score


@_probability.register_fake
def _(
    query: Tensor,
    key: Tensor,
    log_mass: Tensor,
    lengths: Tensor,
    scale: float,
    tiles: Tensor | None,
    count: Tensor | None,
    tile: int,
) -> Tensor:
    return _score_of(query, key, tiles, tile)


def _score_of(query: Tensor, key: Tensor, tiles: Tensor | None, tile: int) -> Tensor:
    size = key.shape[-2] if tiles is None else tiles.shape[-1] * tile
    return torch.empty(*query.shape[:3], size, dtype=torch.float32, device=query.device)


@torch.library.custom_op("mage_kernels::tile_mass", mutates_args=())
def tile_mass(tile_log_mass: Tensor, log_mass: Tensor, lengths: Tensor, tile: int) -> Tensor:
    """See `mage_kernels.key_scores.tile_mass`; every tensor with its layers."""
    layers, batch, heads, num_tiles, num_rows = tile_log_mass.shape
    mass = log_mass.new_empty(layers, batch, heads, num_tiles)
    block_t = 16
    mass_kernel[(triton.cdiv(num_tiles, block_t), layers * batch * heads)](
        tile_log_mass,
        log_mass,
        lengths,
        mass,
        num_tiles,
        num_rows,
        tile,
        num_batch=batch,
        num_heads=heads,
        BLOCK_T=block_t,
        BLOCK_R=min(256, max(16, triton.next_power_of_2(num_rows))),
        num_warps=4,
    )
    return mass


@tile_mass.register_fake
def _(tile_log_mass: Tensor, log_mass: Tensor, lengths: Tensor, tile: int) -> Tensor:
    return log_mass.new_empty(tile_log_mass.shape[:-1])


@torch.library.custom_op("mage_kernels::mean_logit", mutates_args=())
def mean_logit(query: Tensor, key: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See `mage_kernels.key_scores.mean_logit`; every tensor with its layers."""
    layers, batch, heads, _, head_dim = query.shape
    score = _score_of(query, key, None, 0)
    block_n = 128
    logit_kernel[(triton.cdiv(key.shape[-2], block_n), layers * batch * heads)](
        query.mean(-2, dtype=torch.float32),
        key,
        lengths,
        score,
        scale,
        key.shape[-2],
        *key.stride()[:4],
        num_batch=batch,
        num_heads=heads,
        D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_N=block_n,
        num_warps=4,
    )
    return score


@mean_logit.register_fake
def _(query: Tensor, key: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return _score_of(query, key, None, 0)
