"""The weights are the wide operand of the tensor cores, 64 of their rows a program; the few rows of x are its columns.

Tiles come from a sweep on an H100 with 32 rows (docs/performance.md): 64 x 128 of the weights in four stages reads them
at 92 to 98 % of the copy rate where programs are many, and parts of the inner dimension make them so.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64
NUM_WARPS = 4
NUM_STAGES = 4
FULL_WAVE = 132
"""Multiprocessors of an H100."""
LONG = 8192
"""Inputs from which parts pay although the programs are more than one wave."""


@triton.jit
def product(p_w, p_x, m_x, start, end, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_M] sums over inputs start to end of the weight rows at p_w and the rows at p_x."""
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    o_k = tl.arange(0, BLOCK_K)
    for i_k in range(start, end, BLOCK_K):
        b_w = tl.load(p_w + (i_k + o_k)[None, :])
        b_x = tl.load(p_x + (i_k + o_k)[:, None], mask=m_x, other=0.0)
        b_acc = tl.dot(b_w, b_x, b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def linear_kernel(
    x_ptr,  # [rows, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N], read where HAS_BIAS
    out_ptr,  # [parts, rows, N]
    num_rows,
    N,
    K,
    part_size,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Owns BLOCK_N outputs of all rows, over one part of the inputs."""
    i_n, i_part = tl.program_id(0), tl.program_id(1)
    o_n, o_m = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    p_w = weight_ptr + tl.minimum(o_n, N - 1)[:, None].to(tl.int64) * K  # rows beyond the last are read for nothing
    p_x = x_ptr + o_m[None, :] * K
    m_x = (o_m < num_rows)[None, :]
    start = i_part * part_size
    end = tl.minimum(K, start + part_size)
    b_acc = product(p_w, p_x, m_x, start, end, BLOCK_N, BLOCK_M, BLOCK_K)
    if HAS_BIAS:  # the first part brings it
        b_bias = tl.load(bias_ptr + o_n, mask=(o_n < N) & (i_part == 0), other=0.0)
        b_acc += b_bias[:, None].to(tl.float32)
    p_out = out_ptr + (i_part * num_rows + o_m)[None, :].to(tl.int64) * N + o_n[:, None]
    m_out = (o_n < N)[:, None] & m_x
    tl.store(p_out, b_acc.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def gate_up_kernel(
    x_ptr,  # [rows, K]
    weight_ptr,  # [2 * SIZE, K]
    out_ptr,  # [rows, SIZE]
    num_rows,
    SIZE,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Owns BLOCK_N / 2 outputs of all rows: one tile of weights holds their gates, then their ups."""
    HALF: tl.constexpr = BLOCK_N // 2
    i_n = tl.program_id(0)
    o_tile, o_m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    o_n = i_n * HALF + o_tile % HALF + tl.where(o_tile < HALF, 0, SIZE)
    p_w = weight_ptr + o_n[:, None].to(tl.int64) * K
    p_x = x_ptr + o_m[None, :] * K
    m_x = (o_m < num_rows)[None, :]
    b_acc = product(p_w, p_x, m_x, 0, K, BLOCK_N, BLOCK_M, BLOCK_K)
    b_gate, b_up = tl.split(tl.permute(tl.reshape(b_acc, [2, HALF, BLOCK_M]), [1, 2, 0]))
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    o_out = i_n * HALF + tl.arange(0, HALF)
    p_out = out_ptr + o_m[None, :] * SIZE + o_out[:, None]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_x)


def best_parts(weight: Tensor) -> int:
    """Parts of the inner dimension that fill the GPU: 1, 2 or 4."""
    programs = triton.cdiv(weight.shape[0], BLOCK_N)
    if 4 * programs <= FULL_WAVE or weight.shape[1] >= LONG:
        return 4
    return 2 if programs <= FULL_WAVE else 1


def _options(x: Tensor) -> dict[str, int]:
    return {
        "BLOCK_M": 16 if x.shape[0] <= 16 else 32,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": 128 if x.shape[1] % 128 == 0 else 64,
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
    }


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    """(parts, n, outputs): see `mage_kernels.few_rows.linear_parts`; one part is of the inputs' dtype."""
    (rows, inputs), outputs, options = x.shape, weight.shape[0], _options(x)
    part_size = triton.cdiv(triton.cdiv(inputs, parts), options["BLOCK_K"]) * options["BLOCK_K"]
    parts = triton.cdiv(inputs, part_size)
    out = x.new_empty(parts, rows, outputs, dtype=x.dtype if parts == 1 else torch.float32)
    linear_kernel[(triton.cdiv(outputs, BLOCK_N), parts)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        rows,
        outputs,
        inputs,
        part_size,
        HAS_BIAS=bias is not None,
        **options,
    )
    return out


def gate_up(x: Tensor, weight: Tensor) -> Tensor:
    """See `mage_kernels.few_rows.gate_up`."""
    (rows, inputs), size = x.shape, weight.shape[0] // 2
    out = x.new_empty(rows, size)
    gate_up_kernel[(triton.cdiv(size, BLOCK_N // 2),)](x, weight, out, rows, size, inputs, **_options(x))
    return out
