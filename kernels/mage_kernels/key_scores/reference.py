"""Key scores in plain PyTorch; see `mage_kernels.key_scores` for the arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_probability(query: Tensor, key: Tensor, log_mass: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """All probabilities at once, (..., R, capacity), then their mean over the rows."""
    logits = at_least_float32(query) @ at_least_float32(key).transpose(-1, -2) * scale
    probability = (logits - log_mass[..., None]).exp().mean(-2)
    return probability.masked_fill(~is_valid(lengths, key.shape[-2]), 0.0)


def tile_mass(tile_log_mass: Tensor, log_mass: Tensor, lengths: Tensor, tile: int) -> Tensor:
    """exp(tile - all), mean over the rows."""
    mass = (tile_log_mass - log_mass[..., None, :]).exp().mean(-1)
    return mass.masked_fill(~is_valid((lengths + tile - 1) // tile, mass.shape[-1]), 0.0)


def tile_probability(
    query: Tensor,
    key: Tensor,
    log_mass: Tensor,
    lengths: Tensor,
    scale: float,
    tiles: Tensor,
    count: Tensor,
    tile: int,
) -> Tensor:
    """Picked from the scores of all keys."""
    score = mean_probability(query, key, log_mass, lengths, scale)
    position = tiles[..., None] * tile + torch.arange(tile, device=key.device)
    is_meant = torch.arange(tiles.shape[-1], device=key.device) < count[..., None]
    is_inside = (position < key.shape[-2]) & is_meant[..., None]
    picked = score.gather(-1, position.where(is_inside, 0).flatten(-2).long())
    return picked.masked_fill(~is_inside.flatten(-2), 0.0)


def mean_logit(query: Tensor, key: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Keys times the mean row."""
    mean = at_least_float32(query).mean(-2, keepdim=True)
    logit = (mean @ at_least_float32(key).transpose(-1, -2)).squeeze(-2) * scale
    return logit.masked_fill(~is_valid(lengths, key.shape[-2]), 0.0)


def is_valid(lengths: Tensor, size: int) -> Tensor:
    """(batch, 1, size) bool: the first `lengths` entries of each batch row."""
    return torch.arange(size, device=lengths.device) < lengths[:, None, None]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
