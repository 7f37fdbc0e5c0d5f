"""The weights are the wide operand of the tensor cores, BLOCK_N of their rows a program; the few rows of x its columns.

A kernel of a step costs about 2.5 us beside what it reads, so what follows a product is done by the product: the last
program of a tile to arrive adds up its parts and goes on. Parts are added in their order, whoever adds them, so that
the same inputs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from mage_kernels.overlap import launch_options
from mage_kernels.overlap.triton import held, let_next_start, let_next_start_if, wait, wait_asking

FULL_WAVE = 132
"""Multiprocessors of an H100."""
SHORTEST_PART = 512
"""Inputs that are worth a program."""
WHOLE_PART = 512
"""Inputs of a part that a program can hold in shared memory, beside those of x."""
LEAD = tl.constexpr(2)
"""Tiles before its end from which gate and up let the next kernel start."""
LONG = 8192
"""Inputs from which parts are long enough for deeper pipelines."""
ROOMY = 160 * 1024
"""Bytes of shared memory that hold six stages of the default tiles: those of an A100 or H100, not of smaller GPUs."""


class Plan(NamedTuple):
    """Tile sizes and compile options."""

    block_n: int = 64
    block_k: int = 128
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def load_around_wait(
    p_w,
    p_x,
    m_x,
    start,
    end,
    BLOCK_K: tl.constexpr,
    IS_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`wait`, with what a product can load around it.

    Before it, of a part that IS_TILE, the weights at p_w; of a longer part the L2 is asked for the first of them.

    Returns:
        [BLOCK_N, BLOCK_K] weights and [BLOCK_K, BLOCK_M] rows of the tile; zeros of a longer part.
    """
    b_w, b_x = 0, 0
    if IS_TILE:
        o_k = start + tl.arange(0, BLOCK_K)
        b_w = tl.load(p_w + o_k[None, :])
        wait(OVERLAP)
        let_next_start(OVERLAP)  # all of the weights are on their way
        b_x = tl.load(p_x + o_k[:, None], mask=m_x, other=0.0)
    else:
        wait_asking(p_w, start, end, BLOCK_K, OVERLAP)
    return b_w, b_x


@triton.jit
def product(
    b_w,
    b_x,
    p_w,
    p_x,
    m_x,
    start,
    end,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
    LEAD: tl.constexpr = 0,
):
    """[BLOCK_N, BLOCK_M] sums over inputs start to end of the weight rows at p_w and the rows at p_x.

    A part that IS_TILE has been loaded, as b_w and b_x. The next kernel may start LEAD tiles before a longer one ends.
    """
    if IS_TILE:
        b_acc = tl.dot(b_w, held(b_x, OVERLAP), input_precision="ieee")
    else:
        b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        o_k = tl.arange(0, BLOCK_K)
        for i_k in range(start, end, BLOCK_K):
            if LEAD:
                let_next_start_if(i_k >= end - LEAD * BLOCK_K, OVERLAP)
            b_tile = tl.load(p_w + (i_k + o_k)[None, :])
            b_rows = tl.load(p_x + (i_k + o_k)[:, None], mask=m_x, other=0.0)
            b_acc = tl.dot(b_tile, b_rows, b_acc, input_precision="ieee")
        if not LEAD:
            let_next_start(OVERLAP)
    return b_acc


@triton.jit
def load_squares(squares_ptr, num_rows, o_m, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """[BLOCK_TILES, BLOCK_M] sums of squares of each row, by tiles; asked for before a product, needed after it."""
    o_t = tl.arange(0, BLOCK_TILES)[:, None]
    return tl.load(squares_ptr + o_t * num_rows + o_m[None, :], mask=(o_t < TILES) & (o_m < num_rows)[None, :], other=0)


@triton.jit
def row_scale(b_squares, columns, eps):
    """[BLOCK_M] what each row's RMSNorm multiplies it with."""
    return tl.rsqrt(tl.sum(b_squares, 0) / columns + eps)


@triton.jit
def has_all_parts(b_acc, parts_ptr, arrivals_ptr, i_tile, i_part, PARTS: tl.constexpr):
    """Leaves a part of a tile where its last program finds it; whether this is that program."""
    SIZE: tl.constexpr = b_acc.shape[0] * b_acc.shape[1]
    o_tile = tl.arange(0, b_acc.shape[0])[:, None] * b_acc.shape[1] + tl.arange(0, b_acc.shape[1])[None, :]
    tl.store(parts_ptr + (i_tile * PARTS + i_part).to(tl.int64) * SIZE + o_tile, b_acc)
    tl.debug_barrier()  # all of the part is on its way before any thread says so
    return tl.atomic_add(arrivals_ptr + i_tile, 1, sem="acq_rel") == PARTS - 1


@triton.jit
def sum_parts(parts_ptr, arrivals_ptr, i_tile, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] the sum of a tile's parts, all of which have arrived; the next launch counts from 0 again."""
    tl.store(arrivals_ptr + i_tile, 0)
    o_tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    p_part = parts_ptr + i_tile.to(tl.int64) * PARTS * ROWS * COLUMNS + o_tile
    b_sum = tl.load(p_part, cache_modifier=".cg")
    for i_part in tl.static_range(1, PARTS):
        b_sum += tl.load(p_part + i_part * ROWS * COLUMNS, cache_modifier=".cg")
    return b_sum


@triton.jit
def linear_kernel(
    x_ptr,  # [rows, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N], read where HAS_BIAS
    squares_ptr,  # [TILES, rows], read where TILES > 0
    out_ptr,  # [parts, rows, N]
    eps,
    num_rows,
    N,
    K,
    part_size,
    HAS_BIAS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    IS_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Owns BLOCK_N outputs of all rows, over one part of the inputs."""
    i_n, i_part = tl.program_id(0), tl.program_id(1)
    o_n, o_m = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    p_w = weight_ptr + tl.minimum(o_n, N - 1)[:, None].to(tl.int64) * K  # rows beyond the last are read for nothing
    p_x = x_ptr + o_m[None, :] * K
    m_x = (o_m < num_rows)[None, :]
    start = i_part * part_size
    end = tl.minimum(K, start + part_size)
    b_w, b_x = load_around_wait(p_w, p_x, m_x, start, end, BLOCK_K, IS_TILE, OVERLAP)
    if TILES > 0:
        b_squares = load_squares(squares_ptr, num_rows, o_m, TILES, BLOCK_TILES)
    b_acc = product(b_w, b_x, p_w, p_x, m_x, start, end, BLOCK_N, BLOCK_M, BLOCK_K, IS_TILE, OVERLAP)
    if TILES > 0:
        b_acc *= row_scale(b_squares, K, eps)[None, :]
    if HAS_BIAS:  # the first part brings it
        b_bias = tl.load(bias_ptr + o_n, mask=(o_n < N) & (i_part == 0), other=0.0)
        b_acc += b_bias[:, None].to(tl.float32)
    p_out = out_ptr + (i_part * num_rows + o_m)[None, :].to(tl.int64) * N + o_n[:, None]
    m_out = (o_n < N)[:, None] & m_x
    tl.store(p_out, b_acc.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def add_linear_kernel(
    stream_ptr,  # [rows, N]
    x_ptr,  # [rows, K]
    weight_ptr,  # [N, K]
    gain_ptr,  # [N]
    parts_ptr,  # [tiles, PARTS, BLOCK_N, BLOCK_M], used where PARTS > 1
    arrivals_ptr,  # [tiles], zero
    values_ptr,  # [rows, N]
    squares_ptr,  # [tiles, rows]
    num_rows,
    N,
    K,
    part_size,
    PARTS: tl.constexpr,
    IS_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Owns BLOCK_N outputs of all rows, over one part of the inputs; with all parts, of the stream's new columns."""
    i_n, i_part = tl.program_id(0), tl.program_id(1)
    o_n, o_m = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    m_n, m_x = (o_n < N)[:, None], (o_m < num_rows)[None, :]
    p_w = weight_ptr + tl.minimum(o_n, N - 1)[:, None].to(tl.int64) * K
    start = i_part * part_size
    end = tl.minimum(K, start + part_size)
    p_x = x_ptr + o_m[None, :] * K
    b_gain = tl.load(gain_ptr + o_n, mask=o_n < N, other=0.0)
    b_w, b_x = load_around_wait(p_w, p_x, m_x, start, end, BLOCK_K, IS_TILE, OVERLAP)
    o_stream = o_m[None, :] * N + o_n[:, None]
    b_stream = tl.load(stream_ptr + o_stream, mask=m_n & m_x, other=0.0)  # early: it waits for no product
    if IS_TILE:  # (q, k and v, measured, gain nothing by it)
        b_w = held(b_w, OVERLAP)
    b_acc = product(b_w, b_x, p_w, p_x, m_x, start, end, BLOCK_N, BLOCK_M, BLOCK_K, IS_TILE, OVERLAP)
    is_last = True
    if PARTS > 1:
        is_last = has_all_parts(b_acc, parts_ptr, arrivals_ptr, i_n, i_part, PARTS)
    if is_last:
        if PARTS > 1:
            b_acc = sum_parts(parts_ptr, arrivals_ptr, i_n, PARTS, BLOCK_N, BLOCK_M)
        # Rounded to the stream's precision where the unfused code does: the delta, and its sum with the stream.
        b_delta = b_acc.to(stream_ptr.dtype.element_ty).to(tl.float32)
        b_sum = (b_stream.to(tl.float32) + b_delta).to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + o_stream, b_sum, mask=m_n & m_x)
        b_wide = tl.where(m_n, b_sum.to(tl.float32), 0.0)
        b_value = b_wide * b_gain[:, None].to(tl.float32)
        tl.store(values_ptr + o_stream, b_value.to(values_ptr.dtype.element_ty), mask=m_n & m_x)
        tl.store(squares_ptr + i_n * num_rows + o_m, tl.sum(b_wide * b_wide, 0), mask=o_m < num_rows)


@triton.jit
def gate_up_kernel(
    x_ptr,  # [rows, K]
    weight_ptr,  # [2 * SIZE, K]
    squares_ptr,  # [TILES, rows], read where TILES > 0
    out_ptr,  # [rows, SIZE]
    eps,
    num_rows,
    SIZE,
    K,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Owns BLOCK_N / 2 outputs of all rows: one tile of weights holds their gates, then their ups."""
    HALF: tl.constexpr = BLOCK_N // 2
    i_n = tl.program_id(0)
    o_tile, o_m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    o_n = i_n * HALF + o_tile % HALF + tl.where(o_tile < HALF, 0, SIZE)
    p_w = weight_ptr + o_n[:, None].to(tl.int64) * K
    p_x = x_ptr + o_m[None, :] * K
    m_x = (o_m < num_rows)[None, :]
    wait_asking(p_w, 0, K, BLOCK_K, OVERLAP)
    if TILES > 0:
        b_squares = load_squares(squares_ptr, num_rows, o_m, TILES, BLOCK_TILES)
    b_acc = product(0, 0, p_w, p_x, m_x, 0, K, BLOCK_N, BLOCK_M, BLOCK_K, False, OVERLAP, LEAD)
    if TILES > 0:
        b_acc *= row_scale(b_squares, K, eps)[None, :]
    b_gate, b_up = tl.split(tl.permute(tl.reshape(b_acc, [2, HALF, BLOCK_M]), [1, 2, 0]))
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    o_out = i_n * HALF + tl.arange(0, HALF)
    p_out = out_ptr + o_m[None, :] * SIZE + o_out[:, None]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_x)


def make_plan(weight: Tensor, can_split: bool) -> Plan:
    """How these weights are read; parts and stages are what a sweep on an H100 found (docs/performance.md).

    Where the shared memory of all multiprocessors holds the weights, in tiles that are the parts, every program reads
    its tile before it waits.
    """
    outputs, inputs = weight.shape
    if not can_split:
        return Plan()
    tiles = triton.cdiv(outputs, Plan().block_n)
    if inputs % WHOLE_PART == 0 and 1 < inputs // WHOLE_PART <= FULL_WAVE // tiles:
        return Plan(block_k=WHOLE_PART, parts=inputs // WHOLE_PART, num_stages=1)
    parts = max(2, FULL_WAVE // tiles) if tiles <= FULL_WAVE else 1
    stages = 6 if inputs >= LONG and is_roomy(weight.device) else 4
    return Plan(parts=max(1, min(parts, inputs // SHORTEST_PART)), num_stages=stages)


@cache
def is_roomy(device: torch.device) -> bool:
    """Whether long pipelines fit; the interpreter, on a CPU, takes any."""
    if device.type != "cuda":
        return True
    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"] >= ROOMY


def block_m(x: Tensor) -> int:
    """Columns of a tile of products."""
    return 16 if x.shape[0] <= 16 else 32


def options(plan: Plan, x: Tensor) -> dict[str, object]:
    """What all kernels are launched with."""
    return {
        "BLOCK_M": block_m(x),
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        **launch_options(),
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }


def tiles_of(squares: Tensor | None) -> dict[str, int]:
    """How many sums of squares each row has."""
    count = 0 if squares is None else squares.shape[0]
    return {"TILES": count, "BLOCK_TILES": triton.next_power_of_2(max(1, count))}


def split(plan: Plan, x: Tensor) -> tuple[Plan, int]:
    """The plan as far as the inputs can be split, and the size of a part; the last one may be shorter."""
    inputs = x.shape[1]
    if inputs % plan.block_k:
        plan = plan._replace(block_k=64)
    part_size = triton.cdiv(triton.cdiv(inputs, plan.parts), plan.block_k) * plan.block_k
    return plan._replace(parts=triton.cdiv(inputs, part_size)), part_size


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, squares: Tensor | None, eps: float, can_split: bool
) -> Tensor:
    """(parts, n, outputs): see `mage_kernels.few_rows.linear_parts`; one part is of the inputs' dtype."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    plan, part_size = split(make_plan(weight, can_split), x)
    out = x.new_empty(plan.parts, rows, outputs, dtype=x.dtype if plan.parts == 1 else torch.float32)
    linear_kernel[(triton.cdiv(outputs, plan.block_n), plan.parts)](
        x,
        weight,
        weight if bias is None else bias,
        x if squares is None else squares,
        out,
        eps,
        rows,
        outputs,
        inputs,
        part_size,
        HAS_BIAS=bias is not None,
        IS_TILE=part_size == plan.block_k,
        **tiles_of(squares),
        **options(plan, x),
    )
    return out


def add_linear(stream: Tensor, x: Tensor, weight: Tensor, gain: Tensor, arrivals: Tensor) -> tuple[Tensor, Tensor]:
    """See `mage_kernels.few_rows.add_linear`."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    plan, part_size = split(make_plan(weight, can_split=True), x)
    tiles = triton.cdiv(outputs, plan.block_n)
    values, squares = torch.empty_like(stream), x.new_empty(tiles, rows, dtype=torch.float32)
    add_linear_kernel[(tiles, plan.parts)](
        stream,
        x,
        weight,
        gain,
        scratch(plan, x, tiles),
        arrivals,
        values,
        squares,
        rows,
        outputs,
        inputs,
        part_size,
        PARTS=plan.parts,
        IS_TILE=part_size == plan.block_k,
        **options(plan, x),
    )
    return values, squares


def scratch(plan: Plan, x: Tensor, tiles: int) -> Tensor:
    """Where parts of tiles lie until the last one arrives."""
    size = tiles * plan.parts * plan.block_n * block_m(x) if plan.parts > 1 else 1
    return x.new_empty(size, dtype=torch.float32)


def gate_up(x: Tensor, weight: Tensor, squares: Tensor | None, eps: float) -> Tensor:
    """See `mage_kernels.few_rows.gate_up`."""
    (rows, inputs), size = x.shape, weight.shape[0] // 2
    plan, _ = split(make_plan(weight, can_split=False), x)
    out = x.new_empty(rows, size)
    gate_up_kernel[(triton.cdiv(size, plan.block_n // 2),)](
        x,
        weight,
        x if squares is None else squares,
        out,
        eps,
        rows,
        size,
        inputs,
        **tiles_of(squares),
        **options(plan, x),
    )
    return out
