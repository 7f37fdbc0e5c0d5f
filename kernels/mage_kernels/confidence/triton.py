"""Argmax and softmax probability: each program one stretch of one row's vocabulary, then one program per row."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_kernels.online_softmax import LOG2_E

NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def stretch_kernel(
    logits,
    floats,  # [rows, 3, stretches]: maximum, sum of exponentials relative to it, best allowed logit
    tokens,  # [rows, stretches]: where the best allowed logit is
    vocabulary,
    row_stride,
    exclude,
    num_stretches,
    BLOCK: tl.constexpr,
):
    """BLOCK logits of one row."""
    i_part, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_v = i_part * BLOCK + tl.arange(0, BLOCK)
    b_logit = tl.load(logits + i_row * row_stride + o_v, mask=o_v < vocabulary, other=float("-inf")).to(tl.float32)
    top = tl.max(b_logit, 0)
    total = tl.sum(tl.exp2((b_logit - tl.where(top > float("-inf"), top, 0.0)) * LOG2_E), 0)
    b_logit = tl.where(o_v == exclude, float("-inf"), b_logit)
    best = tl.max(b_logit, 0)
    token = tl.min(tl.where(b_logit == best, o_v, NO_TOKEN), 0)
    p_float = floats + i_row * 3 * num_stretches + i_part
    tl.store(p_float, top)
    tl.store(p_float + num_stretches, total)
    tl.store(p_float + 2 * num_stretches, best)
    tl.store(tokens + i_row * num_stretches + i_part, token)


@triton.jit
def row_kernel(floats, tokens, token, probability, num_stretches, BLOCK: tl.constexpr):
    """All stretches of one row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK)
    m_s = o_s < num_stretches
    p_float = floats + i_row * 3 * num_stretches + o_s
    b_top = tl.load(p_float, mask=m_s, other=float("-inf"))
    b_total = tl.load(p_float + num_stretches, mask=m_s, other=0.0)
    b_best = tl.load(p_float + 2 * num_stretches, mask=m_s, other=float("-inf"))
    b_token = tl.load(tokens + i_row * num_stretches + o_s, mask=m_s, other=NO_TOKEN)
    top = tl.max(b_top, 0)
    total = tl.sum(b_total * tl.exp2((b_top - top) * LOG2_E), 0)
    best = tl.max(b_best, 0)
    chosen = tl.min(tl.where(b_best == best, b_token, NO_TOKEN), 0)
    tl.store(token + i_row, tl.where(chosen == NO_TOKEN, 0, chosen).to(tl.int64))  # a row of NaN has no best
    tl.store(probability + i_row, tl.exp2((best - top) * LOG2_E) / total)


@torch.library.custom_op("mage_kernels::confidence", mutates_args=())
def confidence(logits: Tensor, exclude: int | None) -> tuple[Tensor, Tensor]:
    """See `mage_kernels.confidence.confidence`."""
    rows, vocabulary = logits.shape
    block = min(8192, triton.next_power_of_2(vocabulary))
    stretches = triton.cdiv(vocabulary, block)
    floats = torch.empty(rows, 3, stretches, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, stretches, dtype=torch.int32, device=logits.device)
    token, probability = _outputs(logits)
    excluded = -1 if exclude is None else exclude
    stretch_kernel[(stretches, rows)](
        logits, floats, tokens, vocabulary, logits.stride(0), excluded, stretches, BLOCK=block, num_warps=8
    )
    row_kernel[(rows,)](
        floats, tokens, token, probability, stretches, BLOCK=triton.next_power_of_2(stretches), num_warps=1
    )
    return token, probability


@confidence.register_fake
def _(logits: Tensor, exclude: int | None) -> tuple[Tensor, Tensor]:
    return _outputs(logits)


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows, device = logits.shape[0], logits.device
    return torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, dtype=torch.float32, device=device)
