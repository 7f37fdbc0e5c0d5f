"""One program per token and head: normalise, rotate, and put it where it belongs."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


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
