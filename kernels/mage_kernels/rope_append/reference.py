"""Plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_kernels.few_rows import reference as few_rows


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
    qkv = qkv.sum(0).to(rows.dtype)
    size = qkv.shape[0] // batch
    heads = qkv.view(batch, size, -1, head_dim).transpose(1, 2)  # (batch, heads, B, D)
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    step = torch.arange(size, device=qkv.device)
    place = (positions[:, None] + step)[:, None]  # (batch, 1, B)
    query = rotate(normalise(query, query_norm, eps), cosine[place], sine[place])
    key = rotate(normalise(key, key_norm, eps), cosine[place], sine[place])
    row = torch.arange(batch, device=qkv.device)[:, None]
    keys[row, :, slots[:, None] + step] = key.transpose(1, 2)
    values[row, :, slots[:, None] + step] = value.transpose(1, 2)
    rows.copy_(query.reshape(rows.shape))


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
    qkv = few_rows.linear(x, weight, bias, squares, eps)[None]
    rope_append(qkv, cosine, sine, positions, keys, values, slots, None, None, 0.0, rows)


def normalise(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of each head, where the model has one."""
    if weight is None:
        return heads
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(heads.dtype)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding, half-rotation form."""
    low, high = heads.to(torch.promote_types(heads.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1).to(heads.dtype)
