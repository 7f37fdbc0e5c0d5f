"""Milliseconds, by device events on a GPU and by the wall clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


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
