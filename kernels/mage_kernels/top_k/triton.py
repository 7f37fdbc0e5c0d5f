"""Top-k by bisection on the bits of the scores, one program per row.

Floats become integers of the same order; the k-th best is found bit by bit, each time counting how many entries reach
a candidate: 32 counts of what already sits in registers. Ties at the threshold go by position (a running count), and so
do the places in the output, which makes it ascending. No atomics: the result does not depend on timing.

A row longer than one program can hold is narrowed first. It is cut into groups; the k groups of best maxima (again ties
by position) hold the k best entries, since each of them has one at least as good as any entry outside.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BEST = tl.constexpr(0xFFFFFFFF)
"""Order key of what is forced in; 0 is that of what is not there."""


@triton.jit
def order_key(b_score):
    """uint32 keys in the order of the floats; -0 equals 0."""
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    b_bits = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return (b_bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def score_of(b_key):
    """The inverse of `order_key`."""
    b_bits = b_key.to(tl.int32, bitcast=True) ^ -0x80000000
    return (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(p_score, o_n, m_n, length, page, sinks, recent):
    """Order keys of entries o_n of a row, whose scores lie at p_score: forced ones best of all, invalid ones 0."""
    b_key = order_key(tl.load(p_score, mask=m_n, other=0.0))
    first = o_n * page
    m_valid = m_n & (first < length)
    m_forced = (first < sinks) | ((first + page > length - recent) & (recent > 0))
    return tl.where(m_valid, tl.where(m_forced, BEST, b_key), 0).to(tl.uint32)


@triton.jit
def group_kernel(
    score,  # [rows, N]
    lengths,
    best,  # [rows, groups] uint32 as int32
    size,
    num_groups,
    page,
    sinks,
    recent,
    LENGTH_DIV: tl.constexpr,
    LENGTH_MOD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best key of each of BLOCK groups of one row."""
    i_row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + i_row // LENGTH_DIV % LENGTH_MOD)
    o_g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_n = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_key = load_keys(score + i_row * size + o_n, o_n, o_n < size, length, page, sinks, recent)  # [BLOCK, GROUP]
    b_best = tl.max(b_key, 1).to(tl.int32, bitcast=True)
    tl.store(best + i_row * num_groups + o_g, b_best, mask=o_g < num_groups)


@triton.jit
def choose_kernel(
    score,  # [rows, size] scores; or order keys where IS_KEY
    lengths,
    groups,  # [rows, max_groups] ascending group numbers; read where GROUP > 0
    group_count,  # [rows]
    group_left,  # [rows] best score among the groups left out
    index,  # [rows, k]
    count,  # [rows]
    worst_chosen,  # [rows]
    best_left,  # [rows]
    most,  # [rows] entries to choose, at most k; read where HAS_MOST
    k,
    size,
    max_groups,
    page,
    sinks,
    recent,
    LENGTH_DIV: tl.constexpr,
    LENGTH_MOD: tl.constexpr,
    IS_KEY: tl.constexpr,
    GROUP: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row: all its entries, or those of some groups, whose scores lie packed or where they are in the row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_slot = tl.arange(0, WIDTH)
    if GROUP > 0:
        m_n = o_slot // GROUP < tl.load(group_count + i_row)
        o_n = tl.load(groups + i_row * max_groups + o_slot // GROUP, mask=m_n, other=0) * GROUP + o_slot % GROUP
        m_n = m_n & (IS_PACKED | (o_n < size))
    else:
        o_n = o_slot
        m_n = o_slot < size
    if IS_KEY:
        b_key = tl.load(score + i_row * size + o_n, mask=m_n, other=0).to(tl.uint32, bitcast=True)
    else:
        length = tl.load(lengths + i_row // LENGTH_DIV % LENGTH_MOD)
        p_score = score + i_row * size + (o_slot if IS_PACKED else o_n)
        b_key = load_keys(p_score, o_n, m_n, length, page, sinks, recent)

    wanted = tl.load(most + i_row) if HAS_MOST else k
    # The largest threshold that at least as many keys reach as are wanted; 0 where there are fewer.
    threshold = tl.zeros([], tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        reach = tl.sum((b_key >= candidate).to(tl.int32), 0)
        threshold = tl.where(reach >= wanted, candidate, threshold)
        bit = bit >> 1
    m_above = b_key > threshold
    m_tied = (b_key == threshold) & (b_key > 0)
    room = wanted - tl.sum(m_above.to(tl.int32), 0)
    m_chosen = m_above | (m_tied & (tl.cumsum(m_tied.to(tl.int32), 0) <= room))

    b_chosen = m_chosen.to(tl.int32)
    num_chosen = tl.sum(b_chosen, 0)
    tl.store(index + i_row * k + tl.cumsum(b_chosen, 0) - 1, o_n, mask=m_chosen)
    o_k = tl.arange(0, BLOCK_K)
    tl.store(index + i_row * k + o_k, tl.zeros([BLOCK_K], tl.int32), mask=(o_k >= num_chosen) & (o_k < k))
    tl.store(count + i_row, num_chosen)

    worst = tl.min(tl.where(m_chosen, b_key, BEST).to(tl.uint32), 0)
    left = tl.max(tl.where(m_chosen, 0, b_key).to(tl.uint32), 0)
    left_score = tl.where(left == 0, float("-inf"), tl.where(left == BEST, float("inf"), score_of(left)))
    if GROUP > 0 and not IS_PACKED:
        left_score = tl.maximum(left_score, tl.load(group_left + i_row))
    tl.store(worst_chosen + i_row, tl.where(worst == BEST, float("inf"), score_of(worst)))
    tl.store(best_left + i_row, left_score)


@torch.library.custom_op("mage_kernels::top_k", mutates_args=())
def top_k(
    score: Tensor,
    k: int,
    lengths: Tensor,
    page: int,
    sinks: int,
    recent: int,
    groups: Tensor | None,
    group_count: Tensor | None,
    group: int,
    most: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mage_kernels.top_k.top_k`."""
    size = score.shape[-1]
    rule = (page, sinks, recent)
    if groups is not None and group_count is not None:
        return _choose(
            score, k, lengths, *rule, group=group, groups=(groups, group_count, score), is_packed=True, most=most
        )
    if size <= SINGLE_WIDTH:
        return _choose(score, k, lengths, *rule, most=most)
    # As many groups as candidates, about; both must fit a program.
    group = max(-(-size // MAX_WIDTH), min(MAX_WIDTH // k, round((size / k) ** 0.5)))
    group = triton.next_power_of_2(group)
    num_groups = triton.cdiv(size, group)
    best = torch.empty(*score.shape[:-1], num_groups, dtype=torch.int32, device=score.device)
    block = max(1, 2048 // group)
    group_kernel[(triton.cdiv(num_groups, block), score[..., 0].numel())](
        score, lengths, best, size, num_groups, *rule, *_length_of_row(score, lengths), GROUP=group, BLOCK=block
    )
    index, count, _, left = _choose(best, min(k, num_groups), lengths, *rule, is_key=True)
    return _choose(score, k, lengths, *rule, group=group, groups=(index, count, left), most=most)


@top_k.register_fake
def _(
    score: Tensor,
    k: int,
    lengths: Tensor,
    page: int,
    sinks: int,
    recent: int,
    groups: Tensor | None,
    group_count: Tensor | None,
    group: int,
    most: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(score, k)


SINGLE_WIDTH = 8192
"""Up to here a row is chosen from directly: narrowing it first would cost more than it saves."""
MAX_WIDTH = 32768


def _outputs(score: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, device = score.shape[:-1], score.device
    return (
        torch.empty(*rows, k, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def _length_of_row(score: Tensor, lengths: Tensor) -> tuple[int, int]:
    """(divisor, modulus) that lead from a row's number to its length."""
    return (score.shape[-2], lengths.numel()) if lengths.dim() == 1 else (1, lengths.numel())


def _choose(
    score: Tensor,
    k: int,
    lengths: Tensor,
    page: int,
    sinks: int,
    recent: int,
    *,
    is_key: bool = False,
    group: int = 0,
    groups: tuple[Tensor, Tensor, Tensor] | None = None,
    is_packed: bool = False,
    most: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch; groups: their numbers, how many, and the best score among those left out."""
    outputs = _outputs(score, k)
    among, among_count, among_left = groups or (lengths, lengths, lengths)
    width = triton.next_power_of_2(score.shape[-1] if groups is None else among.shape[-1] * group)
    choose_kernel[(score[..., 0].numel(),)](
        score,
        lengths,
        among,
        among_count,
        among_left,
        *outputs,
        lengths if most is None else most,
        k,
        score.shape[-1],
        among.shape[-1],
        page,
        sinks,
        recent,
        *_length_of_row(score, lengths),
        IS_KEY=is_key,
        GROUP=group,
        IS_PACKED=is_packed,
        HAS_MOST=most is not None,
        WIDTH=width,
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=4 if width <= 2048 else 8 if width <= 4096 else 16 if width <= 16384 else 32,
    )
    return outputs
