"""Sparse-step attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def small_attention(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor, scale: float, own: int
) -> tuple[Tensor, Tensor]:
    """See `mage_kernels.small_attention.small_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    slot = torch.arange(key.shape[-2], device=key.device)
    is_seen = ((slot < count[..., None]) | (slot >= key.shape[-2] - own))[..., None, :]  # (batch, KV heads, 1, n)
    logits = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    logits = logits.masked_fill(~is_seen, float("-inf"))
    log_mass = logits.logsumexp(-1)
    weights = (logits - log_mass[..., None]).exp().nan_to_num(0.0)  # -inf - -inf where nothing is seen
    value = value.to(dtype).masked_fill(~is_seen.transpose(-1, -2), 0.0)  # 0 * NaN is NaN
    return (weights @ value).to(query.dtype), log_mass
