"""Launches that overlap on Hopper and later (programmatic dependent launch): a kernel starts while the last one ends.

Only kernels of `few_rows`, `project_append`, `small_attention` and `gather_attention` are launched so; `OVERLAP` in
their code says where. Each allows its successor to start when it has asked for nearly all that it will load: right
after its wait where its weights are one tile, which it has read before; else at the end of its main loop, gate and up
two tiles earlier. That one reads the weights or front keys of its part, if they are one tile, and else asks the L2 for
their first tiles; then it waits. Why all of this is safe:

* **Before its wait a kernel writes nothing, and reads what the kernel before does not write**: weights, where a block
  lies, and front keys; the compiled code is tested for that (`tests/kernels/compile_ops.py`). `project_append` and
  `rope_append`, which come before `small_attention`, write where the block's own keys lie; they must be given no other
  slots of what it reads. Whoever writes front keys (`compact`) or where a block lies has another kernel between that
  and the one that reads it: in the engine a whole step, or the projection of the finished one of two blocks.
* **A hint reads nothing**, and what it fetches cannot grow stale: it stays in the L2, through which all multiprocessors
  write.
* **The wait is for everything before.** `griddepcontrol.wait` waits until the kernel before has completed and its
  writes are visible (PTX ISA, griddepcontrol). Every program of ours waits, so the kernel before had ended its own
  wait: by induction all earlier kernels are done. So none reads too early, and none writes what another still reads,
  scratch memory that the allocator hands out again included. No third kernel starts meanwhile: programs allow that
  only after their own wait.
* **Other kernels** (PyTorch's, cuBLAS's, our small ones) are launched without the attribute by which a kernel says that
  it "will use programmatic means to resolve its stream dependency" (programmaticStreamSerialization, CUDA driver API).
  So the edge before them is an ordinary one, "full completion of the upstream node, with memory visibility"
  (cudaGraphEdgeData), whatever the kernel before allowed. Behind a kernel that allows nothing, ours start when all of
  its programs have ended, and wait too.
* **Arrival counters** are touched after the wait only. The last program of a tile zeroes its counter before its kernel
  completes, so the next launch finds zeros. Nobody spins on a counter, so that programs which merely wait for their
  turn can hold up nothing.

The host decides in `overlapping`; this file imports no Triton, kernels use `overlap.triton`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_is_on = False


def is_possible() -> bool:
    """Whether the current device can: CUDA, compute capability 9.0 and up."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@contextmanager
def overlapping() -> Iterator[None]:
    """In here launches overlap where the device can; meant for the capture of a CUDA graph and its rehearsal."""
    global _is_on
    before, _is_on = _is_on, is_possible()
    try:
        yield
    finally:
        _is_on = before


def launch_options() -> dict[str, bool]:
    """Arguments of a launch."""
    return {"OVERLAP": True, "launch_pdl": True} if _is_on else {"OVERLAP": False}
