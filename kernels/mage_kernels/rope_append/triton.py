"""One program per token and head: normalise, rotate, and put it where it belongs; or as the end of a projection."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mage_kernels.few_rows.triton import (
    has_all_parts,
    load_around_wait,
    load_squares,
    make_plan,
    options,
    product,
    row_scale,
    scratch,
    split,
    sum_parts,
    tiles_of,
)
from mage_kernels.overlap.triton import held


@triton.jit
def load_sum(p, part_stride, mask, PARTS: tl.constexpr, dtype: tl.constexpr):
    """The sum of what lies at p in all parts, rounded to dtype."""
    b_sum = tl.load(p, mask=mask, other=0.0)
    if PARTS > 1:
        for i_part in tl.static_range(1, PARTS):
            b_sum += tl.load(p + i_part * part_stride, mask=mask, other=0.0)
    return b_sum.to(dtype)


@triton.jit
def rope_append_kernel(
    qkv_ptr,  # [PARTS, tokens, heads * D]
    cosine_ptr,
    sine_ptr,
    positions_ptr,
    slots_ptr,
    query_norm_ptr,
    key_norm_ptr,
    rows_ptr,
    keys_ptr,
    values_ptr,
    eps,
    num_tokens,
    KEY_STRIDES,
    VALUE_STRIDES,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one head of one token; heads are numbered queries first, then keys, then values."""
    i_token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_batch, i_place = i_token // SIZE, i_token % SIZE
    o_half = tl.arange(0, BLOCK)
    m_half = o_half < HALF
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    o_head = (i_token * (HEADS + 2 * KV_HEADS) + i_head) * 2 * HALF
    part_stride = num_tokens * (HEADS + 2 * KV_HEADS) * 2 * HALF
    b_low = load_sum(qkv_ptr + o_head + o_half, part_stride, m_half, PARTS, dtype)  # [BLOCK]
    b_high = load_sum(qkv_ptr + o_head + HALF + o_half, part_stride, m_half, PARTS, dtype)
    s_slot = tl.load(slots_ptr + i_batch).to(tl.int64) + i_place
    if i_head >= HEADS + KV_HEADS:
        i_kv = i_head - HEADS - KV_HEADS
        p_value = values_ptr + i_batch * VALUE_STRIDES[0] + i_kv * VALUE_STRIDES[1] + s_slot * VALUE_STRIDES[2]
        tl.store(p_value + o_half, b_low, mask=m_half)
        tl.store(p_value + HALF + o_half, b_high, mask=m_half)
    else:
        is_key = i_head >= HEADS
        if HAS_NORM:
            p_norm = key_norm_ptr if is_key else query_norm_ptr
            b_wide_low, b_wide_high = b_low.to(tl.float32), b_high.to(tl.float32)
            s_square = tl.sum(b_wide_low * b_wide_low, 0) + tl.sum(b_wide_high * b_wide_high, 0)
            s_scale = tl.rsqrt(s_square / (2 * HALF) + eps)
            b_weight_low = tl.load(p_norm + o_half, mask=m_half, other=0.0).to(tl.float32)
            b_weight_high = tl.load(p_norm + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
            # Rounded where the unfused code rounds: after the scale and after the weight.
            b_low = ((b_wide_low * s_scale).to(dtype).to(tl.float32) * b_weight_low).to(dtype)
            b_high = ((b_wide_high * s_scale).to(dtype).to(tl.float32) * b_weight_high).to(dtype)
        o_table = (tl.load(positions_ptr + i_batch).to(tl.int64) + i_place) * HALF + o_half
        b_cosine = tl.load(cosine_ptr + o_table, mask=m_half, other=0.0)
        b_sine = tl.load(sine_ptr + o_table, mask=m_half, other=0.0)
        b_wide_low, b_wide_high = b_low.to(tl.float32), b_high.to(tl.float32)
        b_new_low = b_wide_low * b_cosine - b_wide_high * b_sine
        b_new_high = b_wide_high * b_cosine + b_wide_low * b_sine
        if is_key:
            i_kv = i_head - HEADS
            p_out = keys_ptr + i_batch * KEY_STRIDES[0] + i_kv * KEY_STRIDES[1] + s_slot * KEY_STRIDES[2]
            tl.store(p_out + o_half, b_new_low, mask=m_half)
            tl.store(p_out + HALF + o_half, b_new_high, mask=m_half)
        else:
            p_out = rows_ptr + ((i_batch * HEADS + i_head) * SIZE + i_place) * 2 * HALF
            tl.store(p_out + o_half, b_new_low, mask=m_half)
            tl.store(p_out + HALF + o_half, b_new_high, mask=m_half)


def rope_append(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    rows: Tensor,
) -> None:
    """See `mage_kernels.rope_append.rope_append`."""
    batch, kv_heads, _, head_dim = keys.shape
    parts, tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    rope_append_kernel[(tokens, heads + 2 * kv_heads)](
        qkv,
        cosine,
        sine,
        positions,
        slots,
        qkv if query_norm is None else query_norm,
        qkv if key_norm is None else key_norm,
        rows,
        keys,
        values,
        eps,
        tokens,
        KEY_STRIDES=keys.stride()[:3],
        VALUE_STRIDES=values.stride()[:3],
        SIZE=tokens // batch,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HAS_NORM=query_norm is not None,
        PARTS=parts,
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )


@triton.jit
def project_append_kernel(
    x_ptr,  # [tokens, K]
    weight_ptr,  # [heads * D, K]
    bias_ptr,  # [heads * D], read where HAS_BIAS
    squares_ptr,  # [TILES, tokens], read where TILES > 0
    cosine_ptr,
    sine_ptr,
    positions_ptr,
    slots_ptr,
    rows_ptr,
    keys_ptr,
    values_ptr,
    parts_ptr,  # [tiles, PARTS, BLOCK_N, BLOCK_M], used where PARTS > 1
    arrivals_ptr,  # [tiles], zero
    eps,
    num_tokens,
    K,
    part_size,
    KEY_STRIDES,
    VALUE_STRIDES,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    IS_TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Owns BLOCK_N / 2 pairs of numbers that rotate together, of one head and all tokens; half of a head is many."""
    PAIRS: tl.constexpr = BLOCK_N // 2
    HALF: tl.constexpr = D // 2
    i_tile, i_part = tl.program_id(0), tl.program_id(1)
    i_head, i_pair = i_tile // (HALF // PAIRS), i_tile % (HALF // PAIRS) * PAIRS
    o_tile, o_m, o_pair = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), i_pair + tl.arange(0, PAIRS)
    o_n = i_head * D + i_pair + o_tile % PAIRS + tl.where(o_tile < PAIRS, 0, HALF)
    m_m = o_m < num_tokens
    m_out = m_m[None, :]
    start = i_part * part_size
    end = tl.minimum(K, start + part_size)
    p_w, p_x = weight_ptr + o_n[:, None].to(tl.int64) * K, x_ptr + o_m[None, :] * K
    o_batch, o_place = (o_m // SIZE).to(tl.int64), o_m % SIZE
    b_position = tl.load(positions_ptr + o_batch, mask=m_m, other=0).to(tl.int64) + o_place
    b_slot = tl.load(slots_ptr + o_batch, mask=m_m, other=0).to(tl.int64) + o_place
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + o_n)
    b_w, b_x = load_around_wait(p_w, p_x, m_out, start, end, BLOCK_K, IS_TILE, OVERLAP)
    if TILES > 0:
        b_squares = load_squares(squares_ptr, num_tokens, o_m, TILES, BLOCK_TILES)
    o_table = b_position[None, :] * HALF + o_pair[:, None]
    m_turned = m_out & (i_head < HEADS + KV_HEADS)
    b_cosine = tl.load(cosine_ptr + o_table, mask=m_turned, other=0.0)
    b_sine = tl.load(sine_ptr + o_table, mask=m_turned, other=0.0)
    b_acc = product(b_w, b_x, p_w, p_x, m_out, start, end, BLOCK_N, BLOCK_M, BLOCK_K, IS_TILE, OVERLAP)
    is_last = True
    if PARTS > 1:
        is_last = has_all_parts(b_acc, parts_ptr, arrivals_ptr, i_tile, i_part, PARTS)
    if is_last:
        if PARTS > 1:
            b_acc = sum_parts(parts_ptr, arrivals_ptr, i_tile, PARTS, BLOCK_N, BLOCK_M)
        if TILES > 0:
            b_acc *= row_scale(b_squares, K, eps)[None, :]
        if HAS_BIAS:
            b_acc += b_bias[:, None].to(tl.float32)
        dtype: tl.constexpr = rows_ptr.dtype.element_ty
        b_acc = b_acc.to(dtype).to(tl.float32)  # rounded where the unfused code rounds
        b_low, b_high = tl.split(tl.permute(tl.reshape(b_acc, [2, PAIRS, BLOCK_M]), [1, 2, 0]))
        if i_head >= HEADS + KV_HEADS:
            i_kv = i_head - HEADS - KV_HEADS
            p_value = values_ptr + o_batch * VALUE_STRIDES[0] + i_kv * VALUE_STRIDES[1] + b_slot * VALUE_STRIDES[2]
            p_out = p_value[None, :] + o_pair[:, None]
            tl.store(p_out, b_low.to(dtype), mask=m_out)
            tl.store(p_out + HALF, b_high.to(dtype), mask=m_out)
        else:
            b_cosine, b_sine = held(b_cosine, OVERLAP), held(b_sine, OVERLAP)
            b_new_low = (b_low * b_cosine - b_high * b_sine).to(dtype)
            b_new_high = (b_high * b_cosine + b_low * b_sine).to(dtype)
            if i_head >= HEADS:
                i_kv = i_head - HEADS
                p_key = keys_ptr + o_batch * KEY_STRIDES[0] + i_kv * KEY_STRIDES[1] + b_slot * KEY_STRIDES[2]
                p_out = p_key[None, :] + o_pair[:, None]
                tl.store(p_out, b_new_low, mask=m_out)
                tl.store(p_out + HALF, b_new_high, mask=m_out)
            else:
                p_out = rows_ptr + ((o_batch * HEADS + i_head) * SIZE + o_place)[None, :] * D + o_pair[:, None]
                tl.store(p_out, b_new_low, mask=m_out)
                tl.store(p_out + HALF, b_new_high, mask=m_out)


def project_append(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    squares: Tensor | None,
    eps: float,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rows: Tensor,
    arrivals: Tensor,
) -> None:
    """See `mage_kernels.rope_append.project_append`."""
    batch, kv_heads, _, head_dim = keys.shape
    (tokens, inputs), width = x.shape, weight.shape[0]
    plan, part_size = split(make_plan(weight, can_split=True), x)
    while head_dim % plan.block_n:
        plan = plan._replace(block_n=plan.block_n // 2)
    tiles = width // plan.block_n
    project_append_kernel[(tiles, plan.parts)](
        x,
        weight,
        x if bias is None else bias,
        x if squares is None else squares,
        cosine,
        sine,
        positions,
        slots,
        rows,
        keys,
        values,
        scratch(plan, x, tiles),
        arrivals,
        eps,
        tokens,
        inputs,
        part_size,
        KEY_STRIDES=keys.stride()[:3],
        VALUE_STRIDES=values.stride()[:3],
        SIZE=tokens // batch,
        HEADS=width // head_dim - 2 * kv_heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        HAS_BIAS=bias is not None,
        PARTS=plan.parts,
        IS_TILE=part_size == plan.block_k,
        **tiles_of(squares),
        **options(plan, x),
    )
