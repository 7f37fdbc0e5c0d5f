"""The prefix pass for Hopper: warp-specialised, with asynchronous copies and matrix products (Gluon).

One program owns 64 * GROUPS rows and one part of the prefix's whole tiles. One warp group copies tiles of keys and
values to shared memory, STAGES deep; each of the others owns 64 rows. In a warp group the logits of a tile are computed
while the values of the tile before are still being summed; what one group leaves idle of the tensor cores during its
softmax, the others take (the schedule of FlashAttention-3, arXiv 2407.08608, section 3). As written the softmax
overlaps that sum too, but ptxas waits for the sum first; made to keep the order, the kernel was slower (H100, 7B at
32K, batch 1: 0.0464 ms a layer instead of 0.0439).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LN_2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)
"""Rows of a warp group: the height of its matrix instruction."""


@gluon.jit
def copy_tiles(key, value, k_smem, v_smem, bars, row, count):
    """The copying warp group: `count` tiles of keys and values, from `row` of the flattened cache on."""
    k_ready, k_free, v_ready, v_free = bars
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    for i in range(count):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_ready.index(stage), key.block_type.nbytes)
        tma.async_copy_global_to_shared(key, [row + i * BLOCK_N, 0], k_ready.index(stage), k_smem.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_ready.index(stage), value.block_type.nbytes)
        tma.async_copy_global_to_shared(value, [row + i * BLOCK_N, 0], v_ready.index(stage), v_smem.index(stage))


@gluon.jit
def softmax_step(b_s, b_max, b_sum, qk_scale):
    """Weights of one tile and the softmax state after it; base 2."""
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * qk_scale)
    b_p = gl.exp2(b_s * qk_scale - gl.expand_dims(b_new, 1))
    b_old = gl.exp2(b_max - b_new)
    b_tile = gl.sum(b_p, 1)
    return b_p, b_new, b_sum * b_old + b_tile, b_old, b_tile


@gluon.jit
def fast_log2(x):
    """The hardware's log2, error at most 2^-22 (PTX ISA, lg2.approx): one instruction; the library's takes 40."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def attend_tiles(
    q_smem,  # [ROWS, D]
    k_smem,  # [STAGES, BLOCK_N, D]
    v_smem,
    bars,
    count,
    i_m,  # first row of this warp group
    rows,  # how many there are of this KV head, from which on masses are kept, the factor on logits times log2(e)
    outputs,  # of this part: out [R, D], log mass [R], log masses of its keys [tiles / MASSES_OF, R - mass_from]
    MASSES_OF: gl.constexpr,
):
    """A computing warp group: ROWS rows against `count` tiles."""
    k_ready, k_free, v_ready, v_free = bars
    part_out, part_mass, tile_mass = outputs
    num_rows, mass_from, qk_scale = rows
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    o_m = i_m + gl.arange(0, ROWS, layout=s_rows)
    m_m = o_m < num_rows
    p_tile = tile_mass + o_m - mass_from
    m_tile = m_m & (o_m >= mass_from)
    has_masses = i_m + ROWS > mass_from
    b_max = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
    b_sum = gl.full([ROWS], 0.0, gl.float32, s_rows)
    b_acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    if count > 0:
        mbarrier.wait(k_ready.index(0), 0)
        product = warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(k_free.index(0), count=1)
        b_p, b_max, b_sum, b_old, b_tile = softmax_step(b_s, b_max, b_sum, qk_scale)
        b_weights = gl.convert_layout(b_p.to(k_smem.dtype), p_layout)
        b_mass = b_tile  # of the tiles that share one, relative to the maximum
        for i in range(1, count):
            stage = i % STAGES
            before = (i - 1) % STAGES
            mbarrier.wait(k_ready.index(stage), (i // STAGES) & 1)
            product = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
            if MASSES_OF:  # noqa: SIM102  (the remainder has no meaning for 0)
                # Of the tiles before, while the product runs. The branch and the wait after it keep it here: ptxas
                # moves straight-line code behind the softmax, where nothing hides it.
                if has_masses & (i % MASSES_OF == 0):
                    gl.store(p_tile, (b_max + fast_log2(b_mass)) * LN_2, mask=m_tile)
                    p_tile += num_rows - mass_from
                    b_mass = gl.zeros_like(b_mass)
            mbarrier.wait(v_ready.index(before), ((i - 1) // STAGES) & 1)
            total = warpgroup_mma(b_weights, v_smem.index(before), b_acc, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=(product,))
            mbarrier.arrive(k_free.index(stage), count=1)
            b_p, b_max, b_sum, b_old, b_tile = softmax_step(b_s, b_max, b_sum, qk_scale)
            b_mass = b_tile if MASSES_OF == 1 else b_mass * b_old + b_tile
            b_next = gl.convert_layout(b_p.to(k_smem.dtype), p_layout)
            b_acc = warpgroup_mma_wait(0, deps=(total,))
            mbarrier.arrive(v_free.index(before), count=1)
            b_acc = b_acc * gl.expand_dims(gl.convert_layout(b_old, o_rows), 1)
            b_weights = b_next
        last = (count - 1) % STAGES
        mbarrier.wait(v_ready.index(last), ((count - 1) // STAGES) & 1)
        total = warpgroup_mma(b_weights, v_smem.index(last), b_acc, is_async=True)
        if MASSES_OF:
            gl.store(p_tile, (b_max + fast_log2(b_mass)) * LN_2, mask=m_tile)
        b_acc = warpgroup_mma_wait(0, deps=(total,))
    gl.store(part_mass + o_m, b_max + gl.log2(b_sum), mask=m_m)
    b_divisor = gl.convert_layout(gl.where(b_sum > 0, b_sum, 1.0), o_rows)
    o_out = i_m + gl.arange(0, ROWS, layout=o_rows)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    p_out = part_out + gl.expand_dims(o_out, 1) * D + gl.expand_dims(o_d, 0)
    gl.store(p_out, b_acc / gl.expand_dims(b_divisor, 1), mask=gl.expand_dims(o_out < num_rows, 1))


@gluon.jit
def hopper_split_kernel(
    query,
    key,  # descriptor of [batch * heads * capacity, D]
    value,
    lengths,
    part_out,
    part_mass,
    tile_mass,
    qk_scale,
    num_rows,
    mass_from,
    num_masses,
    capacity,
    q_batch,
    q_head,
    q_row,
    num_heads,
    num_splits,
    D: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    MASSES_OF: gl.constexpr,
    REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """ROWS * GROUPS rows of one KV head against one part of its prefix's whole tiles.

    MASSES_OF tiles share a mass (0: none are kept), and no part begins or ends between them.
    """
    SHARE: gl.constexpr = max(1, MASSES_OF)
    dtype: gl.constexpr = key.dtype
    i_split, i_bh = gl.program_id(1), gl.program_id(2)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    masses = gl.load(lengths + i_b) // (BLOCK_N * SHARE)
    per_split = (masses + num_splits - 1) // num_splits
    start = gl.minimum(i_split * per_split, masses)
    count = gl.minimum(per_split, masses - start) * SHARE
    i_m = gl.program_id(0) * ROWS * GROUPS
    i_part = (i_bh * num_splits + i_split).to(gl.int64)
    part_out += i_part * num_rows * D
    part_mass += i_part * num_rows
    tile_mass += (i_bh.to(gl.int64) * num_masses + start) * (num_rows - mass_from)
    row = i_bh * capacity + start * SHARE * BLOCK_N

    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, D], q_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], key.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], value.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    bars = (k_ready, k_free, v_ready, v_free)

    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps, 1], [1, 0])
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, load_layout))
    p_q = query + i_b.to(gl.int64) * q_batch + i_h * q_head
    for group in gl.static_range(GROUPS):
        o_m = i_m + group * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, load_layout))
        p_rows = p_q + gl.expand_dims(o_m, 1) * q_row + gl.expand_dims(o_d, 0)
        q_smem.index(group).store(gl.load(p_rows, mask=gl.expand_dims(o_m < num_rows, 1), other=0.0))
    fence_async_shared()

    outputs = (part_out, part_mass, tile_mass)
    rows = (num_rows, mass_from, qk_scale)
    second, third = i_m + ROWS, i_m + 2 * ROWS
    copies = (key, value, k_smem, v_smem, bars, row, count)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (attend_tiles, (q_smem.index(0), k_smem, v_smem, bars, count, i_m, rows, outputs, MASSES_OF)),
                (attend_tiles, (q_smem.index(1), k_smem, v_smem, bars, count, second, rows, outputs, MASSES_OF)),
                (copy_tiles, copies),
            ],
            [4, 4],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (attend_tiles, (q_smem.index(0), k_smem, v_smem, bars, count, i_m, rows, outputs, MASSES_OF)),
                (attend_tiles, (q_smem.index(1), k_smem, v_smem, bars, count, second, rows, outputs, MASSES_OF)),
                (attend_tiles, (q_smem.index(2), k_smem, v_smem, bars, count, third, rows, outputs, MASSES_OF)),
                (copy_tiles, copies),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, 24],
        )


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    part_out: Tensor,
    part_mass: Tensor,
    tile_mass: Tensor,
    qk_scale: float,
    *,
    groups: int,
    block_n: int,
    num_splits: int,
    stages: int,
    masses_of: int,
    mass_from: int,
) -> None:
    """Write `part_out`, `part_mass` and `tile_mass` as `split_kernel` of triton.py does; 64 * groups rows a program.

    `masses_of` tiles (0, 1 or 2) share a mass.
    """
    batch, heads, num_rows, head_dim = query.shape
    capacity = key.shape[-2]
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[key.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([block_n, head_dim], dtype)
    flat, block = [batch * heads * capacity, head_dim], [block_n, head_dim]
    key_tiles, value_tiles = (TensorDescriptor(x, flat, [head_dim, 1], block, layout) for x in (key, value))
    hopper_split_kernel[(triton.cdiv(num_rows, 64 * groups), num_splits, batch * heads)](
        query,
        key_tiles,
        value_tiles,
        lengths,
        part_out,
        part_mass,
        tile_mass,
        qk_scale,
        num_rows,
        mass_from,
        tile_mass.shape[2],
        capacity,
        *query.stride()[:3],
        heads,
        num_splits,
        D=head_dim,
        GROUPS=groups,
        BLOCK_N=block_n,
        STAGES=stages,
        MASSES_OF=masses_of,
        REGISTERS=240 if groups == 2 else 160,  # with 24 of the copying group, all that a multiprocessor has
        num_warps=4,
    )
