"""What a run owes to the launcher that started it; imports nothing heavy, as it is asked for first."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

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
