"""What tests and benchmarks of kernels share: inputs, and an error budget that does not depend on taste.

A kernel may err, against float64 on the very same low-precision inputs, at most twice as much as plain PyTorch in that
precision, plus one rounding of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for every dtype up to rounding."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention as plain PyTorch computes it in the dtype of its inputs: products rounded to it, softmax in float32."""
    weights = (query @ key.transpose(-1, -2) * scale).float().softmax(dim=-1)
    return weights.to(query.dtype) @ value


def relative_error(out: Tensor, exact: Tensor) -> float:
    """|out - exact| / |exact|, in float64; NaN and infinity never pass for small."""
    difference = (out.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)
    return float(difference.nan_to_num(nan=float("inf")))


def check_error(out: Tensor, exact: Tensor, eager: Tensor) -> float:
    """The error of `out` as a multiple of eager's.

    Args:
        out: the kernel's result.
        exact: the same in float64, from the same inputs.
        eager: the same by plain PyTorch in the inputs' precision.

    Raises:
        AssertionError: it is over the budget.
    """
    mine, theirs = relative_error(out, exact), relative_error(eager, exact)
    budget = 2 * theirs + torch.finfo(out.dtype).eps
    assert mine <= budget, f"error {mine:.2e} is over the budget {budget:.2e} (eager {theirs:.2e})"
    return mine / max(theirs, 1e-30)
