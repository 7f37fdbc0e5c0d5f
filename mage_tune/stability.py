"""What ends a training run early, or warns about it: signals, numbers that are not finite, and spikes."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from statistics import median
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what batch systems send some seconds before they kill."""

PASSED_ON_S = 2.0
"""A launcher in the same process group gets a signal too, and passes it on or ends: one signal, which comes twice."""


class NonFiniteError(ValueError):
    """A loss, gradient or weight became NaN or infinite."""


class TrainingStopped(Exception):
    """A signal ended the run before its last step; the checkpoint it left can be resumed."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class StopOnSignal(TrainerCallback):
    """Inside `with`, the first Ctrl-C or SIGTERM lets the step finish, saves a checkpoint and ends the training.

    A second one acts as it always did, unless it comes within `PASSED_ON_S`. Only the main thread can listen; elsewhere
    nothing changes.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        try:
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        except ValueError:  # not the main thread
            self._before = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if time.monotonic() - self._noted_at >= PASSED_ON_S:
                self._restore()
                signal.raise_signal(signum)
            return
        self.signum, self._noted_at = signum, time.monotonic()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping: finishing this step and saving a checkpoint (once more stops at once)\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, on every process after the same step."""
        if self._any_process(args.device):
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The signal came while a checkpoint was written: that one will do."""
        if self._any_process(args.device):
            control.should_training_stop = True

    def _any_process(self, device: torch.device) -> bool:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            highest = torch.tensor(self.signum or 0, device=device)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
            self.signum = int(highest) or None
        return self.signum is not None


def ignore_stop_signals(worker: int) -> None:
    """For data-loading processes: a signal to the whole group must not take them from the step that still runs."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class SpikeGuard:
    """Tells when a series leaves the range of its recent past; one for the loss, one for the gradient norm.

    Args:
        name: what the series is called.
        factor: a spike is more than this many times the median of the last `window` values, and further above it than
            five of their median deviations, so that a noisy series is left alone.
        window: values remembered.
        least: values needed before anything is a spike.
    """

    def __init__(self, name: str, factor: float, window: int = 30, least: int = 10) -> None:
        self.name, self.factor, self.least = name, factor, least
        self.recent: deque[float] = deque(maxlen=window)

    def check(self, value: float) -> str | None:
        """Remember `value`; what to say if it is a spike, else None."""
        usual = median(self.recent) if len(self.recent) >= self.least else math.inf
        spread = median(abs(past - usual) for past in self.recent) if math.isfinite(usual) else 0.0
        self.recent.append(value)
        if value > max(self.factor * usual, usual + 5 * spread):
            return f"{self.name} {value:.3g}, {value / usual:.1f} times the median of the last steps ({usual:.3g})"
        return None
