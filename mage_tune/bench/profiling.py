"""Where the milliseconds of a step go, kernel by kernel."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mage_tune.bench.clock import median_ms
from mage_tune.decode.engine.engine import Engine, Step

REPEATS = 5


def profile_steps(engine: Engine) -> dict[str, Any]:
    """Kernel times of one step of each kind: an exact one, one that scores, the choice, a sparse one, a commit.

    Returns:
        steps: for each kind `ms` (undisturbed), `busy_ms` (sum of its kernels, so ms - busy_ms are gaps) and
            `kernels`, a list of {"name", "ms", "calls"} per step, longest first.
    """
    device = engine.weights.device
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    engine.plan()
    kinds: list[Step] = ["exact", "score", "select", "sparse", "commit"] if engine.chooser else ["exact", "commit"]
    steps = {}
    engine.set_active([False] * engine.cache.batch)  # commits are done, and move nothing on
    for kind in kinds:
        ms = median_ms(partial(engine.run, kind), device, repeats=REPEATS)
        with profile(activities=[activity]) as recorded:
            for _ in range(REPEATS):
                engine.run(kind)
            if device.type == "cuda":
                torch.cuda.synchronize()
        kernels = _kernels(recorded, device)
        steps[kind] = {"ms": ms, "busy_ms": sum(kernel["ms"] for kernel in kernels), "kernels": kernels}
    return {"steps": steps}


def _kernels(recorded: profile, device: torch.device) -> list[dict[str, Any]]:
    """Device time by kernel (by operation on a CPU), per step."""
    total: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for event in recorded.key_averages():
        us = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        total[event.key] += us / 1e3 / REPEATS
        calls[event.key] += event.count
    order = sorted((name for name in total if total[name] > 0), key=lambda name: -total[name])
    return [{"name": name[:120], "ms": total[name], "calls": calls[name] / REPEATS} for name in order]
