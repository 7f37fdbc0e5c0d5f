"""Plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, squares: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """See `mage_kernels.few_rows.linear`."""
    return F.linear(scaled(x, squares, eps), weight, bias)


def gate_up(x: Tensor, weight: Tensor, squares: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """See `mage_kernels.few_rows.gate_up`."""
    gate, up = F.linear(scaled(x, squares, eps), weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def add_linear(stream: Tensor, x: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """See `mage_kernels.few_rows.add_linear`."""
    stream += F.linear(x, weight)
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return (wide * gain).to(stream.dtype), wide.square().sum(-1)[None]


def scaled(x: Tensor, squares: Tensor | None, eps: float) -> Tensor:
    """The rows as their RMSNorm leaves them, where sums of squares are given."""
    if squares is None:
        return x
    scale = torch.rsqrt(squares.sum(0) / x.shape[1] + eps)
    return (x.to(squares.dtype) * scale[:, None]).to(x.dtype)
