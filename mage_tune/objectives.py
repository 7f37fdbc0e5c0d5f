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

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden rows (n, hidden) -> logits (n, vocab)."""


def cross_entropy_sum(hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, chunk: int = 4096) -> Tensor:
    """Weighted cross-entropy of the chosen rows, without ever holding all logits.

    Args:
        hidden: (n, hidden) rows that predict.
        head: output projection.
        targets: (n,) int64.
        weights: (n,) float32.
        chunk: rows projected at once; logits of a chunk are recomputed in the backward pass.

    Returns:
        Scalar float32: sum of weight * cross-entropy.
    """

    def part(rows: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy(head(rows).float(), target, reduction="none") * weight).sum()

    return _sum_in_chunks(part, chunk, hidden, targets, weights)


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

    def part(student_rows: Tensor, teacher_rows: Tensor, weight: Tensor) -> Tensor:
        log_student = head(student_rows).float().log_softmax(-1)
        with torch.no_grad():
            log_teacher = head(teacher_rows).float().log_softmax(-1)
        first, second = (log_teacher, log_student) if teacher_first else (log_student, log_teacher)
        return ((first.exp() * (first - second)).sum(-1) * weight).sum()

    return _sum_in_chunks(part, chunk, student, teacher.detach(), weights)


def _sum_in_chunks(part: Callable[..., Tensor], chunk: int, *rows: Tensor) -> Tensor:
    total = rows[0][:0].float().sum()  # a zero that keeps the graph, as noise may have hidden nothing
    for start in range(0, rows[0].shape[0], chunk):
        piece = [r[start : start + chunk] for r in rows]
        total = total + checkpoint(part, *piece, use_reentrant=False)
    return total


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
