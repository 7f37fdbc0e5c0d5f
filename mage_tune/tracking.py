"""Trackers beside metrics.jsonl: trackio, TensorBoard, Weights & Biases. One that fails warns, and training goes on.

A run folder has an id, so that two runs of one recipe are two runs there, and one that goes on is the same run.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from transformers import TrainerCallback

PROJECT = "mage_tune"
"""Project that runs are filed under."""
ID_FILE = "run_id"
"""Holds the id, in the run folder."""
EXTRAS = {"trackio": "track", "tensorboard": "tensorboard", "wandb": "wandb"}
"""What to install: extras of the package."""


@dataclass(frozen=True)
class Run:
    """What a tracker is told when it is started."""

    folder: Path
    name: str
    """The recipe's."""
    id: str
    """The name and the folder's own letters: the same when a run goes on."""
    step: int
    """Steps that were done before; whatever was logged after them is logged again."""
    config: dict[str, Any]
    """The recipe as plain data."""


class Tracker(Protocol):
    """What takes one line of measurements."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers of one step."""

    def finish(self) -> None:
        """The run is over."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        """One scalar a name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write what is buffered."""
        self.writer.close()


def _trackio(run: Run) -> Tracker:
    import trackio

    return trackio.init(project=PROJECT, name=run.id, config=run.config, resume="allow")


def _wandb(run: Run) -> Tracker:
    import wandb

    options: dict[str, Any] = {"id": run.id, "name": run.name, "resume": "allow"}
    return wandb.init(project=PROJECT, config=run.config, dir=str(run.folder), **options)


STARTERS: dict[str, Callable[[Run], Tracker]] = {
    "trackio": _trackio,
    "tensorboard": TensorBoard,
    "wandb": _wandb,
}
"""Name in the recipe -> a started tracker."""


def run_id(folder: Path, step: int) -> str:
    """The letters that tell this run folder from others; new ones for a run that begins."""
    file = folder / ID_FILE
    known = file.read_text().strip() if step and file.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        file.write_text(known + "\n")
    return known


class Tracking(TrainerCallback):
    """Sends every log line to the recipe's trackers, on the main process.

    Args:
        names: keys of `STARTERS`.
        folder, name, config: run folder, the recipe's name, and the recipe as plain data.
        console: where a failure is told.
    """

    def __init__(self, names: Sequence[str], folder: Path, name: str, config: dict[str, Any], console: Console) -> None:
        self.names, self.folder, self.name, self.config, self.console = names, folder, name, config, console
        self.trackers: dict[str, Tracker] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start them."""
        if not self.names or not state.is_world_process_zero:
            return
        done = state.global_step
        run = Run(self.folder, self.name, f"{self.name}-{run_id(self.folder, done)}", done, self.config)
        for name in self.names:
            try:
                self.trackers[name] = STARTERS[name](run)
            except ModuleNotFoundError as error:
                self._told(name, "is not there", f"{error}; pip install 'mage_tune[{EXTRAS[name]}]'")
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

    def _told(self, name: str, what: str, error: Exception | str) -> None:
        text = " ".join(str(error).split()) or type(error).__name__
        self.console.print(
            f"warning: train.trackers: {name} {what} ({text}); training goes on, metrics.jsonl has it all",
            style="yellow", markup=False, soft_wrap=True,
        )  # fmt: skip
