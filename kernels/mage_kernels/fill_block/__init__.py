"""One step's decision for every block of a batch: which drawn tokens stay. Nothing of it is seen by the host.

The place of a draw is open if it holds the mask token and lies in the sub-block in work, the first that has any. The
`quota` surest open draws are accepted (of equal ones the earlier place), and with a threshold all those above it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mage_kernels.choice import choose
from mage_kernels.layout import check_shape

MOST_PLACES = 256
"""Every draw of a block is compared with every other in one program."""


def fill_block(
    ids: Tensor,
    token: Tensor,
    confidence: Tensor,
    progress: Tensor,
    left: Tensor,
    quotas: Tensor,
    *,
    mask_id: int,
    window: int,
    shift: int,
    threshold: float | None,
    impl: str = "auto",
) -> None:
    """Accept draws into blocks, in place.

    Args:
        ids: (batch, B) int64 blocks, the mask token where undecided.
        token: (batch, B) int64 draws, never the mask token; that for place p is at p - shift. With a shift place 0
            must be decided already.
        confidence: (batch, B) float32 probabilities of the draws, at the same places.
        progress: (batch, 3) int64, updated: first place of the sub-block in work (-1 at the start of a block), steps it
            has taken, steps the block has taken with a mask token in it.
        left: (batch,) int64, written: mask tokens left; -1 if the confidence of an open draw was NaN, once and for all.
        quotas: (n,) int64: draws a sub-block's step accepts at least; later steps ask for as many as the last.
        mask_id: the mask token.
        window: places of a sub-block; divides B.
        shift: 1 when logits predict the next token, else 0.
        threshold: confidence above which draws are accepted; None for the quota alone.
        impl: "auto", "triton" or "reference".

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: "triton" was asked for and cannot run.
    """
    batch, size = ids.shape
    for name, tensor, shape, dtype in (
        ("token", token, (batch, size), torch.int64),
        ("confidence", confidence, (batch, size), torch.float32),
        ("progress", progress, (batch, 3), torch.int64),
        ("left", left, (batch,), torch.int64),
        ("quotas", quotas, tuple(quotas.shape[:1]), torch.int64),
    ):
        check_shape("fill_block", name, tensor, shape)
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"fill_block: {name} must be contiguous {dtype}, got {tensor.dtype} {tensor.stride()}")
    if ids.dtype != torch.int64 or not ids.is_contiguous():
        raise ValueError(f"fill_block: ids must be contiguous int64, got {ids.dtype} {ids.stride()}")
    if window < 1 or size % window or shift not in (0, 1):
        raise ValueError(f"fill_block: window {window} must divide the block of {size}, and shift {shift} be 0 or 1")
    limit = f"a block of {size} is longer than {MOST_PLACES}" if size > MOST_PLACES else None
    if choose("fill_block", impl, ids, token, confidence, progress, left, quotas, limit=limit):
        from mage_kernels.fill_block import triton as chosen
    else:
        from mage_kernels.fill_block import reference as chosen  # type: ignore[no-redef]
    chosen.fill_block(ids, token, confidence, progress, left, quotas, mask_id, window, shift, threshold)
