"""Compaction by gather and where."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(key: Tensor, value: Tensor, index: Tensor, count: Tensor, out_key: Tensor, out_value: Tensor) -> None:
    """See `mage_kernels.compact.compact`."""
    k = index.shape[-1]
    is_meant = (torch.arange(k, device=index.device) < count[..., None])[..., None]
    rows = index.where(is_meant.squeeze(-1), 0).long()[..., None].expand(*index.shape, key.shape[-1])
    for cache, out in ((key, out_key), (value, out_value)):
        front = out[..., :k, :]
        front.copy_(torch.where(is_meant, cache.gather(-2, rows), front))
