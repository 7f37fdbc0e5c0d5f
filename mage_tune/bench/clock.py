"""Milliseconds, by device events on a GPU and by the wall clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

SPIN_CYCLES = 2_000_000
"""Of the kernel that measures a clock: about a millisecond."""


def elapsed_ms(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, from an idle device until it is idle again."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def median_ms(work: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int = 1) -> float:
    """The median of `repeats` times after some that do not count."""
    for _ in range(warm_up):
        work()
    return statistics.median(elapsed_ms(work, device) for _ in range(repeats))


def sm_mhz() -> float | None:
    """Clock of the GPU's multiprocessors at the moment; None without a GPU.

    By the time that a kernel takes which only counts cycles. A card that is warm or at its power limit lowers its
    clock, and two times compare only at the same one.
    """
    if not torch.cuda.is_available():
        return None
    ms = elapsed_ms(lambda: torch.cuda._sleep(SPIN_CYCLES), torch.device("cuda"))
    return SPIN_CYCLES / ms / 1e3
