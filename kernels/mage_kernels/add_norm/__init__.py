"""Add a layer's output to the residual stream and normalise the sum (RMSNorm), in one pass over the row."""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose
from mage_kernels.layout import check_shape

MOST_COLUMNS = 16384
"""A row stays in the registers of one program."""


def add_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, impl: str = "auto") -> Tensor:
    """RMSNorm of `residual + delta`; the sum, rounded to the stream's dtype, replaces `residual` in place.

    Args:
        residual: (n, hidden), contiguous; changed in place.
        delta: (n, hidden), or (parts, n, hidden) whose sum it is (`few_rows.linear_parts`), contiguous; None to
            normalise the stream as it is.
        weight: (hidden,).
        eps: added to the mean square.
        impl: "auto", "triton" or "reference".

    Returns:
        (n, hidden), of the stream's dtype. Statistics are float32.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: "triton" was asked for and cannot run.
    """
    if delta is not None:
        if delta.dim() == residual.dim():
            delta = delta[None]
        check_shape("add_norm", "delta", delta, (delta.shape[0], *residual.shape))
    check_shape("add_norm", "weight", weight, (residual.shape[-1],))
    tensors = [x for x in (residual, delta, weight) if x is not None]
    limit = None
    if not all(x.is_contiguous() for x in tensors):
        limit = "a tensor is not contiguous"
    elif residual.shape[-1] > MOST_COLUMNS:
        limit = f"a row of {residual.shape[-1]} is longer than {MOST_COLUMNS}"
    if choose("add_norm", impl, *tensors, limit=limit):
        from mage_kernels.add_norm import triton as chosen
    else:
        from mage_kernels.add_norm import reference as chosen  # type: ignore[no-redef]
    return chosen.add_norm(residual, delta, weight, eps)
