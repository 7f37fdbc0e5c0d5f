"""Progress of a training run: a live bar with ETA on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

PLAIN_EVERY_S = 10.0
"""Seconds between two lines when the output is not a terminal."""


class ProgressReporter(TrainerCallback):
    """Inside `with`, shows step, loss, terms, speed and time left; only on the main process."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.started = 0.0
        self.first_step = 0
        self.last_line = 0.0

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(self, *error: object) -> None:
        """Give the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self.started, self.first_step = time.perf_counter(), state.global_step
        if not state.is_world_process_zero:
            return
        if self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, line="")
            self.bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Update the bar, or print a line now and then."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line = summary(logs)
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, line=line)
            return
        now = time.perf_counter()
        if now - self.last_line >= PLAIN_EVERY_S or state.global_step == state.max_steps:
            done = state.global_step - self.first_step
            left = (now - self.started) / max(done, 1) * (state.max_steps - state.global_step)
            self.console.print(f"step {state.global_step}/{state.max_steps} · {line} · {clock(left)} left")
            self.last_line = now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say where a run could go on from."""
        if state.is_world_process_zero:
            saved = f"step {state.global_step}: checkpoint saved to {args.output_dir}/checkpoint-{state.global_step}"
            self.console.print(saved, markup=False, highlight=False, soft_wrap=True)


def summary(logs: dict[str, Any]) -> str:
    """One line of a log record: loss, its terms, gradient norm, speed, utilisation, memory."""
    terms = [
        name for name in ("diffusion", "query_alignment", "attention_alignment", "sparse_distillation") if name in logs
    ]
    parts = [f"loss {logs['loss']:.4f}"]
    if len(terms) > 1:
        parts += [f"{name} {logs[name]:.3g}" for name in terms]
    parts += [f"grad {logs.get('grad_norm', float('nan')):.2f}", f"{logs['tokens_per_s']:.0f} tok/s"]
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.0%}")
    if "peak_gib" in logs:
        parts.append(f"{logs['peak_gib']:.1f} GiB")
    return " · ".join(parts)


def closing(steps: int, seconds: float, tokens: float, peak_gib: float, memory: str) -> str:
    """One line of what a run took, from where it went on; `memory` says of what the peak is."""
    speed = f"{tokens:,.0f} tokens, {tokens / seconds:,.0f} tok/s on average"
    return f"{steps} steps in {clock(seconds)} · {speed} · peak {peak_gib:.1f} GiB of {memory}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
