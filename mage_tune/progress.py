"""Progress of a training run: a live bar with ETA on a terminal, plain lines in a log.

    3/8 ━━━━━━━━╺━━━━━━━━━━━━━ 00:04 left · loss 5.541 · 4,332 tok/s · MFU 41% · 60.3 GiB
    diffusion 5.4210 · query 0.0113 · attention 0.1234 · sparse 5.1234 · grad 2.16

Both rows fit a terminal of 80 columns: on a narrow one terms go by their first words.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback

from mage_tune.recipe_schema import TERMS

PLAIN_EVERY_S = 10.0
"""Seconds between two lines when the output is not a terminal."""
SPEED_OVER_S = 600.0
"""Seconds of steps that the bar's ETA is made from. rich's own 30 hold no two steps where one takes longer."""


class ProgressReporter(TrainerCallback):
    """Inside `with`, shows step, loss, terms, speed and time left; only on the main process."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: TwoRows | None = None
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
        if state.is_world_process_zero and self.console.is_terminal:
            self.bar = TwoRows(self.console)
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, logs={})
            self.bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Update the bar, or print a line now and then."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, logs=dict(logs))
            return
        now = time.perf_counter()
        if now - self.last_line >= PLAIN_EVERY_S or state.global_step == state.max_steps:
            done = state.global_step - self.first_step
            left = (now - self.started) / max(done, 1) * (state.max_steps - state.global_step)
            line = (
                f"step {state.global_step}/{state.max_steps} · {clock(left)} left · {summary(logs)} · {details(logs)}"
            )
            self.console.print(line, soft_wrap=True)
            self.last_line = now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say where a run could go on from."""
        if state.is_world_process_zero:
            saved = f"step {state.global_step}: checkpoint saved to {args.output_dir}/checkpoint-{state.global_step}"
            self.console.print(saved, markup=False, highlight=False, soft_wrap=True)


class TwoRows(Progress):
    """Step, bar, time left and `summary` in a row as wide as the terminal; `details` below it.

    A task's field "logs" is the last log record; empty before there is one.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the others leave
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("left"),
            LogColumn(table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
            speed_estimate_period=SPEED_OVER_S,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        """The rows."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["logs"]:
                yield Details(task.fields["logs"])


class LogColumn(TextColumn):
    """`summary` of a task's log record."""

    def __init__(self, table_column: Column) -> None:
        super().__init__("", table_column=table_column)

    def render(self, task: Any) -> Text:
        """Nothing before there is a record."""
        return Text(f"· {summary(task.fields['logs'])}" if task.fields["logs"] else "")


class Details:
    """`details` in one row, with short names where the whole ones do not fit."""

    def __init__(self, logs: dict[str, Any]) -> None:
        self.logs = logs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        line = details(self.logs)
        if len(line) > options.max_width:
            line = details(self.logs, is_short=True)
        yield Text(line, style="bright_black", no_wrap=True, overflow="ellipsis")


def summary(logs: dict[str, Any]) -> str:
    """What a log record says first: loss, speed, utilisation, memory."""
    parts = [f"loss {logs['loss']:.3f}", f"{logs['tokens_per_s']:,.0f} tok/s"]
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.0%}")
    if "peak_gib" in logs:
        parts.append(f"{logs['peak_gib']:.1f} GiB")
    return " · ".join(parts)


def details(logs: dict[str, Any], *, is_short: bool = False) -> str:
    """What the loss is made of, where it has several terms, and the gradient norm."""
    terms = [name for name in TERMS if name in logs]
    names = [name.partition("_")[0] if is_short else name for name in terms]
    parts = [f"{name} {number(logs[term])}" for name, term in zip(names, terms, strict=True)] if len(terms) > 1 else []
    return " · ".join([*parts, f"grad {logs.get('grad_norm', float('nan')):.2f}"])


def number(value: float) -> str:
    """Four decimals, or two digits of what would be nothing then."""
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.2g}"


def closing(steps: int, seconds: float, tokens: float, peak_gib: float, memory: str) -> str:
    """One line of what a run took, from where it went on; `memory` says of what the peak is."""
    speed = f"{tokens:,.0f} tokens, {tokens / seconds:,.0f} tok/s on average"
    return f"{steps} steps in {clock(seconds)} · {speed} · peak {peak_gib:.1f} GiB of {memory}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
