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
