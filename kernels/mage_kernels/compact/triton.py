"""Compaction: every program copies some rows of keys and values of one KV head of one layer."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def compact_kernel(
    key,
    value,
    index,  # [layers * batch * heads, k]
    count,
    out_key,
    out_value,
    k,
    k_layer,
    k_batch,
    k_head,
    k_row,
    v_layer,
    v_batch,
    v_head,
    v_row,
    ok_layer,
    ok_batch,
    ok_head,
    ok_row,
    ov_layer,
    ov_batch,
    ov_head,
    ov_row,
    num_batch,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K chosen keys of one KV head of one layer."""
    i_row = tl.program_id(1).to(tl.int64)
    i_l, i_b, i_h = i_row // (num_batch * num_heads), i_row // num_heads % num_batch, i_row % num_heads
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < tl.load(count + i_row)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_kd = m_k[:, None] & (o_d < D)
    o_n = tl.load(index + i_row * k + o_k, mask=m_k, other=0).to(tl.int64)[:, None]
    b_k = tl.load(key + i_l * k_layer + i_b * k_batch + i_h * k_head + o_n * k_row + o_d, mask=m_kd)
    b_v = tl.load(value + i_l * v_layer + i_b * v_batch + i_h * v_head + o_n * v_row + o_d, mask=m_kd)
    o_k = o_k.to(tl.int64)[:, None]
    tl.store(out_key + i_l * ok_layer + i_b * ok_batch + i_h * ok_head + o_k * ok_row + o_d, b_k, mask=m_kd)
    tl.store(out_value + i_l * ov_layer + i_b * ov_batch + i_h * ov_head + o_k * ov_row + o_d, b_v, mask=m_kd)


@torch.library.custom_op("mage_kernels::compact", mutates_args=("out_key", "out_value"))
def compact(key: Tensor, value: Tensor, index: Tensor, count: Tensor, out_key: Tensor, out_value: Tensor) -> None:
    """See `mage_kernels.compact.compact`; every tensor with its layers."""
    layers, batch, heads, k = index.shape
    block_k = 32
    compact_kernel[(triton.cdiv(k, block_k), layers * batch * heads)](
        key,
        value,
        index,
        count,
        out_key,
        out_value,
        k,
        *key.stride()[:4],
        *value.stride()[:4],
        *out_key.stride()[:4],
        *out_value.stride()[:4],
        num_batch=batch,
        num_heads=heads,
        D=key.shape[-1],
        BLOCK_D=triton.next_power_of_2(key.shape[-1]),
        BLOCK_K=block_k,
        num_warps=4,
    )


@compact.register_fake
def _(key: Tensor, value: Tensor, index: Tensor, count: Tensor, out_key: Tensor, out_value: Tensor) -> None:
    return None
