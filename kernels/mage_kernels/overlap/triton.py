"""What kernels do to overlap; see `mage_kernels.overlap` for why it is safe."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ASKED_TILES = tl.constexpr(2)
"""Tiles of weights that a program asks for before it waits; a power of two. More of them took bandwidth from the kernel
before (docs/performance.md)."""


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """The next kernel may start once all programs of this one have come here or ended."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def let_next_start_if(is_time, OVERLAP: tl.constexpr):
    """`let_next_start` where the scalar is true, without a branch, so that a loop around it can still be pipelined."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $1, 0; @p griddepcontrol.launch_dependents; mov.u32 $0, 0;}",
            "=r,r",
            [is_time.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until all kernels before this one have ended and what they wrote can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def wait_asking(p_w, start, end, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr):
    """`wait`, and meanwhile ask the L2 for the first tiles, from start on, of the weight rows at p_w."""
    if OVERLAP:
        o_first = tl.minimum(start + tl.arange(0, ASKED_TILES) * BLOCK_K, end - BLOCK_K)
        ask(p_w + o_first[None, :], BLOCK_K * p_w.dtype.element_ty.primitive_bitwidth // 8)
    wait(OVERLAP)


@triton.jit
def held(x, OVERLAP: tl.constexpr):
    """x (of 16 or 32 bits a number), which stays as it was loaded until here: all loads are on their way.

    Else a compiler moves what it has loaded to where it is needed piece by piece, and waits for some of the pieces
    before it asks for others: several times for the latency of memory.
    """
    if OVERLAP:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        tl.debug_barrier()  # which ptxas moves no load across
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)
    return x


@triton.jit
def ask(p, BYTES: tl.constexpr):
    """Ask the L2 for BYTES, a multiple of 16, at each of the addresses; a hint, after which nothing has been read."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [p.to(tl.int64, bitcast=True) & -16, BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
