"""What a run owes to the launcher that started it, and its share of the work; imports nothing heavy: it comes first."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mage_tune.recipe import Train

PR_SET_PDEATHSIG = 1
"""Of <sys/prctl.h>."""

LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
"""Environment variables, one of which accelerate or torchrun gives to whatever it starts."""


def stop_with_launcher(launcher: int) -> None:
    """Have this process get a SIGTERM when its launcher ends: accelerate's, killed by its pid, tells nobody.

    Only on Linux, and only in what a launcher started: a run that a shell started may outlive the shell.

    Args:
        launcher: the parent's pid as this process began.
    """
    if sys.platform != "linux" or not LAUNCHED & os.environ.keys():
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it ended before we asked
        signal.raise_signal(signal.SIGTERM)


def micro_steps_per_process(settings: Train, processes: int | None = None) -> int:
    """Micro-steps of one optimizer step that each process (of this launch) does: the same run on any number of them.

    Raises:
        ValueError: they cannot be shared out evenly.
    """
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if settings.accumulation % processes:
        enough = -(-settings.accumulation // processes) * processes
        raise ValueError(
            f"train.accumulation: {settings.accumulation} micro-steps cannot be shared evenly by {processes} "
            f"processes; use --set train.accumulation={enough} (and train.rows smaller, for the same rows per step)"
        )
    return settings.accumulation // processes
