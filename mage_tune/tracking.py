"""Trackers beside metrics.jsonl: trackio, TensorBoard, Weights & Biases. One that fails warns, and training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from transformers import TrainerCallback

PROJECT = "mage_tune"
"""Project that runs are filed under."""


class Tracker(Protocol):
    """What takes one line of measurements."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers of one step."""

    def finish(self) -> None:
        """The run is over."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, run: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        """One scalar a name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write what is buffered."""
        self.writer.close()


def _trackio(folder: Path, run: str, config: dict[str, Any]) -> Tracker:
    import trackio

    return trackio.init(project=PROJECT, name=run, config=config, resume="allow")


def _wandb(folder: Path, run: str, config: dict[str, Any]) -> Tracker:
    import wandb

    return wandb.init(project=PROJECT, name=run, config=config, dir=str(folder))


STARTERS: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "trackio": _trackio,
    "tensorboard": TensorBoard,
    "wandb": _wandb,
}
"""Name in the recipe -> a started tracker, from run folder, run name and recipe."""


class Tracking(TrainerCallback):
    """Sends every log line to the recipe's trackers, on the main process.

    Args:
        names: keys of `STARTERS`.
        folder, run, config: run folder, its name, and the recipe as plain data.
        console: where a failure is told.
    """

    def __init__(self, names: Sequence[str], folder: Path, run: str, config: dict[str, Any], console: Console) -> None:
        self.names, self.folder, self.run, self.config, self.console = names, folder, run, config, console
        self.trackers: dict[str, Tracker] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start them."""
        for name in self.names if state.is_world_process_zero else ():
            try:
                self.trackers[name] = STARTERS[name](self.folder, self.run, self.config)
            except Exception as error:
                self._told(name, "does not start", error)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Pass the numbers on."""
        if logs and "loss" in logs:
            self._each("stopped", lambda tracker: tracker.log(dict(logs), step=state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish them."""
        self._each("did not finish", lambda tracker: tracker.finish())

    def _each(self, failing: str, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever a tracker raises must not end a run
                del self.trackers[name]
                self._told(name, failing, error)

    def _told(self, name: str, what: str, error: Exception) -> None:
        text = " ".join(str(error).split()) or type(error).__name__
        self.console.print(
            f"warning: train.trackers: {name} {what} ({text}); training goes on, metrics.jsonl has it all",
            style="yellow", markup=False, soft_wrap=True,
        )  # fmt: skip
