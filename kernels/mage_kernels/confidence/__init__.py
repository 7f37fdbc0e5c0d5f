"""The most probable token of every position and its probability, in one pass over the logits."""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose
from mage_kernels.confidence import reference
from mage_kernels.layout import check_last_stride


def confidence(logits: Tensor, *, exclude: int | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Greedy choice and its softmax probability.

    Args:
        logits: (rows, vocabulary), floating; the last dimension contiguous.
        exclude: token that is never chosen; it still counts in the normalisation.

    Returns:
        token: (rows,) int64; of equal logits the lowest id.
        probability: (rows,) float32, exp(logit - log-sum-exp of all logits).

    Raises:
        ValueError: shapes or numbers do not fit.
        RuntimeError: `impl="triton"` cannot run here.
    """
    op = "confidence"
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"{op}: logits must be floating (rows, vocabulary), got {logits.dtype} {tuple(logits.shape)}")
    check_last_stride(op, "logits", logits)
    if exclude is not None and not 0 <= exclude < logits.shape[1]:
        raise ValueError(f"{op}: exclude {exclude} is not in a vocabulary of {logits.shape[1]}")
    if not choose(op, impl, logits):
        return reference.confidence(logits, exclude)
    from mage_kernels.confidence import triton

    return triton.confidence(logits, exclude)
