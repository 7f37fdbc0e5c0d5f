"""Plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def fill_block(
    ids: Tensor,
    token: Tensor,
    confidence: Tensor,
    progress: Tensor,
    left: Tensor,
    quotas: Tensor,
    mask_id: int,
    window: int,
    shift: int,
    threshold: float | None,
) -> None:
    """See `mage_kernels.fill_block.fill_block`."""
    token, confidence = token.roll(shift, dims=1), confidence.roll(shift, dims=1)
    place = torch.arange(ids.shape[1], device=ids.device)
    is_masked = ids == mask_id
    begin = is_masked.int().argmax(-1) // window * window
    step = torch.where(begin == progress[:, 0], progress[:, 1], 0)
    quota = quotas[step.clamp(max=len(quotas) - 1)]
    is_open = is_masked & (place >= begin[:, None]) & (place < begin[:, None] + window)
    sure = confidence.masked_fill(~is_open, float("-inf"))
    accepted = is_open & (rank_of(sure) < quota[:, None])
    if threshold is not None:
        accepted |= is_open & (sure > threshold)
    is_bad = (confidence.isnan() & is_open).any(-1) | (left < 0)
    ids.copy_(torch.where(accepted, token, ids))
    progress.copy_(torch.stack([begin, step + 1, progress[:, 2] + is_masked.any(-1)], dim=1))
    left.copy_(torch.where(is_bad, -1, (ids == mask_id).sum(-1)))


def rank_of(score: Tensor) -> Tensor:
    """(batch, n) -> (batch, n) int64: how many entries of the row are better; equal ones go by position."""
    earlier = torch.ones(score.shape[-1], score.shape[-1], dtype=torch.bool, device=score.device).tril(-1)
    mine, other = score[:, :, None], score[:, None, :]
    return ((other > mine) | ((other == mine) & earlier)).sum(-1)
