"""Launches that overlap (programmatic dependent launch); imports Triton, so only `triton.py` files import it.

A kernel launched with `choice.overlap` may start while the one before it still runs: its programs take what room is
left on the GPU and ask for their weights while the others finish. Rules:

* Every program waits before it reads what an earlier kernel wrote, and before it writes at all. Until then it may only
  `prefetch`, which moves nothing but into the L2. The tests hold compiled kernels to this (`compile_ops.py`).
* It lets the next kernel start first of all. That one waits until this one has ended, which is after this one's own
  wait; so a kernel that has waited comes after all kernels before it, not only after the last.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """The next kernel may start once all programs of this one have come here."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until all kernels before this one have ended and what they wrote can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def start_when_due(OVERLAP: tl.constexpr):
    """Both, for kernels that have nothing to do in between."""
    let_next_start(OVERLAP)
    wait(OVERLAP)


@triton.jit
def prefetch(p, BYTES: tl.constexpr):
    """Ask the L2 for BYTES, a multiple of 16, at each of the addresses; a hint, after which nothing has been read."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [p.to(tl.int64, bitcast=True) & -16, BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
