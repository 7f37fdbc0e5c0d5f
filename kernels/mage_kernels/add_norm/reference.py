"""Plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def add_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `mage_kernels.add_norm.add_norm`."""
    if delta is not None:
        residual += delta.sum(0).to(residual.dtype)
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(residual.dtype)
