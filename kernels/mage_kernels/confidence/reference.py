"""Argmax and softmax in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def confidence(logits: Tensor, exclude: int | None) -> tuple[Tensor, Tensor]:
    """See `mage_kernels.confidence.confidence`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    allowed = logits.clone()
    if exclude is not None:
        allowed[:, exclude] = float("-inf")
    best = allowed.amax(-1, keepdim=True)
    token = (allowed == best).int().argmax(-1)  # the first of equal ones, on every device
    return token, logits.softmax(-1).gather(-1, token[:, None]).squeeze(-1).float()
