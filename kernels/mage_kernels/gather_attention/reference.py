"""Gather, then attend, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    own_key: Tensor,
    own_value: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `mage_kernels.gather_attention.gather_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    is_meant = torch.arange(index.shape[-1], device=index.device) < count[..., None]  # (batch, KV heads, k)
    rows = index.where(is_meant, 0).long()[..., None].expand(*index.shape, key.shape[-1])
    chosen_value = value.gather(-2, rows).masked_fill(~is_meant[..., None], 0.0)  # 0 * NaN is NaN
    chosen = query.to(dtype) @ key.gather(-2, rows).to(dtype).transpose(-1, -2)
    own = query.to(dtype) @ own_key.to(dtype).transpose(-1, -2)
    logits = torch.cat([chosen.masked_fill(~is_meant[..., None, :], float("-inf")), own], dim=-1) * scale
    log_mass = logits.logsumexp(-1)
    weights = (logits - log_mass[..., None]).exp().nan_to_num(0.0)  # -inf - -inf where nothing is seen
    return (weights @ torch.cat([chosen_value, own_value], dim=-2).to(dtype)).to(query.dtype), log_mass
