"""Plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `mage_kernels.few_rows.linear`."""
    return F.linear(x, weight, bias)


def gate_up(x: Tensor, weight: Tensor) -> Tensor:
    """See `mage_kernels.few_rows.gate_up`."""
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * up
