"""The terms of the loss, as pure functions of tensors.

Every function returns a *sum* over its items (tokens or blocks); the trainer divides by the number of items of the
whole optimizer step, so that gradient accumulation and several GPUs change nothing.

    diffusion            sum_i w_i * CE(logits_i, token_i)                             the family's own loss
    query_alignment      sum_j mean_h dist(qbar_jh at all-[MASK], sg[qbar_jh later])   ours
    attention_alignment  sum_j mean_h KL(p_jh later || p_jh at all-[MASK])             ours
    sparse_distillation  sum_i w_i * CE_i + lambda * sum_i KL(teacher_i || student_i)  MAGE v1 (arXiv 2602.14209v1)

j runs over blocks, h over KV heads; qbar is the post-RoPE query averaged over the block's positions and the group's
heads, p the attention over the prefix averaged over the same rows, sg a stop-gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Head = Callable[[Tensor], Tensor]
"""Hidden rows (n, hidden) -> logits (n, vocab); a module if its parameters are to have gradients."""


def cross_entropy_sum(hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, chunk: int = 4096) -> Tensor:
    """Weighted cross-entropy of the chosen rows, without ever holding all logits.

    Args:
        hidden: (n, hidden) rows that predict.
        head: output projection.
        targets: (n,) int64.
        weights: (n,) float32.
        chunk: rows projected at once.

    Returns:
        Scalar float32: sum of weight * cross-entropy.
    """
    return _sum_in_chunks(_fast(cross_entropy_), chunk, head, hidden, targets, weights)


def kl_sum(
    student: Tensor, teacher: Tensor, head: Head, weights: Tensor, *, teacher_first: bool = True, chunk: int = 4096
) -> Tensor:
    """KL divergence between next-token distributions of two sets of hidden rows.

    Args:
        student, teacher: (n, hidden); no gradient flows to the teacher.
        head: output projection, shared (the head carries no adapter).
        weights: (n,) float32.
        teacher_first: KL(teacher || student), which covers the teacher's modes; else KL(student || teacher).

    Returns:
        Scalar float32: sum of weight * KL in nats.
    """
    divergence = kl_to_student_ if teacher_first else kl_to_teacher_

    def term(logits: Tensor, teacher_rows: Tensor, weight: Tensor) -> Tensor:
        return _fast(divergence)(logits, head(teacher_rows), weight)

    return _sum_in_chunks(term, chunk, head, student, teacher.detach(), weights)


def _sum_in_chunks(term: Term, chunk: int, head: Head, hidden: Tensor, *others: Tensor) -> Tensor:
    parameters = [p for p in head.parameters() if p.requires_grad] if isinstance(head, nn.Module) else []
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
    return _SumInChunks.apply(term, chunk, head, others, wants_gradient, hidden, *parameters)


Term = Callable[..., Tensor]
"""Logits (n, vocab) and what else is told of each row -> (n,) float32; the logits become their gradient."""


class _SumInChunks(torch.autograd.Function):
    """Sum of a term over rows of logits.

    Its gradient is made in the forward pass, while the logits of a chunk are there, and in their place: they are
    projected once and read twice. The backward pass only scales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        term: Term,
        chunk: int,
        head: Head,
        others: Sequence[Tensor],
        wants_gradient: bool,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        """Scalar float32."""
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if wants_gradient else None
        grads: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, len(hidden), chunk):
            some = slice(start, start + chunk)
            with torch.set_grad_enabled(wants_gradient):
                rows = hidden[some].detach().requires_grad_(wants_gradient)
                logits = head(rows)
            values = logits.detach()
            total += term(values, *(other[some] for other in others)).sum()
            if grad_hidden is not None:
                grad_hidden[some], *found = torch.autograd.grad(logits, (rows, *parameters), values)
                grads = [new if old is None else old + new for old, new in zip(grads, found, strict=True)]
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, scaled; a scale of 16 bits would be off by up to 0.4 %."""

        def scaled(grad: Tensor) -> Tensor:
            return (grad.to(torch.promote_types(grad.dtype, scale.dtype)) * scale).to(grad.dtype)

        return *(None,) * 5, *(None if grad is None else scaled(grad) for grad in ctx.saved_tensors)


@cache
def _compiled(term: Term) -> Term:
    return torch.compile(term)


def _is_compiled_for(x: Tensor) -> bool:
    return x.is_cuda


def _fast(term: Term) -> Term:
    """`term`, compiled on a GPU."""

    def call(logits: Tensor, *others: Tensor) -> Tensor:
        with torch.no_grad():
            if not _is_compiled_for(logits):
                return term(logits, *others)
            # What begins in the middle of a tensor would be compiled for apart.
            return _compiled(term)(logits, *(other.clone() if other.storage_offset() else other for other in others))

    return call


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy of each row; `logits` become its gradient."""
    wide = logits.float()
    log_sum = wide.logsumexp(-1, keepdim=True)
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    at_target = torch.where(is_target, wide, 0.0).sum(-1)
    gradient = ((wide - log_sum).exp() - is_target.float()) * weights[:, None]
    losses = (log_sum[:, 0] - at_target) * weights
    logits.copy_(gradient)
    return losses


def kl_to_student_(logits: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Weighted KL(teacher || student) of each row; the student's `logits` become its gradient."""
    student, target = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    divergence = (target.exp() * (target - student)).sum(-1)
    gradient = (student.exp() - target.exp()) * weights[:, None]
    logits.copy_(gradient)
    return divergence * weights


def kl_to_teacher_(logits: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Weighted KL(student || teacher) of each row; the student's `logits` become its gradient."""
    student, target = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    apart = student - target
    divergence = (student.exp() * apart).sum(-1)
    gradient = student.exp() * (apart - divergence[:, None]) * weights[:, None]
    logits.copy_(gradient)
    return divergence * weights


def block_mean_queries(rows: Tensor, group: int = 1) -> Tensor:
    """Block-average queries.

    Args:
        rows: (batch, KV heads, blocks, R, D) packed queries, ordered by query head, then position.
        group: query heads kept apart in each KV head; 1 averages over them too.

    Returns:
        (batch, KV heads * group, blocks, D) float32.
    """
    mean = rows.float().unflatten(-2, (group, -1)).mean(dim=-2)  # (batch, KV heads, blocks, group, D)
    return mean.transpose(2, 3).flatten(1, 2)


def undo_rotary(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Packed queries as they were before rotary positions (the half-split form of Llama and Qwen).

    Args:
        rows: (batch, KV heads, blocks, R, D), rows ordered by query head, then position.
        cos, sin: (blocks, B, D) of every position, or (batch, blocks, B, D).

    Returns:
        Same shape as `rows`, float32.
    """
    by_head = rows.float().unflatten(-2, (-1, cos.shape[-2]))  # (batch, KV heads, blocks, group, B, D)
    first, second = by_head.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    if cos.dim() == 5:
        cos, sin = cos[:, None], sin[:, None]
    return ((by_head * cos - turned * sin) / (cos.square() + sin.square())).flatten(-3, -2)


def query_alignment_sum(
    at_mask: Tensor, later: Tensor, is_counted: Tensor, distance: str = "cosine", *, symmetric: bool = False
) -> Tensor:
    """Distance between block-average queries at the all-[MASK] step and at a later step.

    Args:
        at_mask: (batch, heads, blocks, D); carries the gradient.
        later: same shape; the target.
        is_counted: (batch, blocks) bool.
        distance: "cosine" (1 - cosine) or "squared" (squared error / squared norm of the target).
        symmetric: gradient flows to the target too; else only to `at_mask`.

    Returns:
        Scalar: sum over counted blocks of the mean over heads.
    """
    later = later if symmetric else later.detach()
    if distance == "cosine":
        apart = 1.0 - F.cosine_similarity(at_mask, later, dim=-1)
    elif distance == "squared":
        apart = (at_mask - later).square().sum(-1) / later.square().sum(-1).clamp_min(1e-12)
    else:
        raise ValueError(f"unknown distance {distance!r}: cosine or squared")
    return (apart.mean(dim=1) * is_counted).sum()


def attention_alignment_sum(
    at_mask: Tensor,
    later: Tensor,
    is_counted: Tensor,
    *,
    later_first: bool = True,
    top_k: int | None = None,
    power: float = 1.0,
    symmetric: bool = False,
    floor: float = 1e-8,
) -> Tensor:
    """KL between the block's mean attention over the prefix at a later step and at the all-[MASK] step.

    Args:
        at_mask, later: (batch, KV heads, blocks, N) probabilities over the prefix, zero outside it; `later` is the
            target.
        is_counted: (batch, blocks) bool; a counted block has a prefix.
        later_first: KL(later || all-mask): all-[MASK] attention must cover every key that matters later. Else reversed.
        top_k: compare on the keys of highest probability at the later step alone, both sides renormalised there.
        power: compare distributions proportional to probability ** power: below 1, keys of little mass count for more.
        symmetric: gradient flows to the target too; else only to `at_mask`.
        floor: added inside the logarithms, so that keys outside the prefix count for nothing.

    Returns:
        Scalar: sum over counted blocks of the mean over KV heads, in nats.
    """
    later = later if symmetric else later.detach()
    if top_k is not None:
        best = later.topk(min(top_k, later.shape[-1]), dim=-1).indices
        later, at_mask = _sharpened(later.gather(-1, best), power), _sharpened(at_mask.gather(-1, best), power)
    elif power != 1.0:
        later, at_mask = _sharpened(later, power), _sharpened(at_mask, power)
    first, second = (later, at_mask) if later_first else (at_mask, later)
    divergence = (first * ((first + floor).log() - (second + floor).log())).sum(-1)
    return (divergence.mean(dim=1) * is_counted).sum()


def _sharpened(probability: Tensor, power: float, least: float = 1e-12) -> Tensor:
    """probability ** power, renormalised over the last dimension; zeros stay zeros and pass no gradient.

    `least` keeps the gradient of a power below 1 finite: keys of less mass than that are outside the prefix, or never
    chosen.
    """
    raised = torch.where(probability > least, probability.clamp_min(least) ** power, 0.0)
    return raised / raised.sum(-1, keepdim=True).clamp_min(least)
