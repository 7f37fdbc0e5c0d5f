"""Exact attention in plain PyTorch: all logits at once, in float32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `mage_kernels.exact_attention.exact_attention`; tiles beyond a length get -inf, masses are always new."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    capacity = key.shape[-2]
    is_valid = torch.arange(capacity, device=key.device) < lengths[:, None]
    value = value.masked_fill(~is_valid[:, None, :, None], 0.0)  # 0 * NaN is NaN
    logits = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    logits = logits.masked_fill(~is_valid[:, None, None], float("-inf"))
    prefix_log_mass = logits[..., own_from:, :].logsumexp(-1)
    tile_log_mass = None
    if tile is not None:
        tiles = F.pad(logits[..., own_from:, :], (0, -capacity % tile), value=float("-inf")).unflatten(-1, (-1, tile))
        tile_log_mass = tiles.logsumexp(-1).transpose(-1, -2).contiguous()
    if own_key is not None and own_value is not None:
        own = query.to(dtype) @ own_key.to(dtype).transpose(-1, -2) * scale
        own[..., :own_from, :] = float("-inf")
        logits = torch.cat([logits, own], dim=-1)
        value = torch.cat([value, own_value], dim=-2)
    log_mass = logits.logsumexp(-1)
    weights = (logits - log_mass[..., None]).exp().nan_to_num(0.0)  # -inf - -inf where nothing is seen
    return (weights @ value.to(dtype)).to(query.dtype), log_mass, prefix_log_mass, tile_log_mass
