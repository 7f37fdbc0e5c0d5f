"""A run folder: what is written into it, in which order, and when a run may go on from it.

    recipe.yaml  versions.json  mage_tune.json  metrics.jsonl  checkpoints/
    adapter_config.json  adapter_model.safetensors

The adapter's weights come last: their presence means that the run has finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from mage_tune.backbone import write_family
from mage_tune.environment import environment
from mage_tune.families import Family
from mage_tune.recipe import Recipe, RecipeError, resolved_yaml

ADAPTER_FILE = "adapter_model.safetensors"
"""Its presence at the top of a run folder means the run has finished."""


def prepare_folder(folder: Path, recipe: Recipe) -> str | None:
    """Make the run folder, or find the checkpoint to go on from.

    Raises:
        RecipeError: see `train`.
    """
    if (folder / ADAPTER_FILE).exists():
        raise RecipeError(f"{folder}: holds a finished run; choose another output, or remove the folder to train again")
    if recipe.train.resume not in ("auto", "never"):
        if not (Path(recipe.train.resume) / "trainer_state.json").is_file():
            raise RecipeError(
                f"train.resume: no checkpoint at {recipe.train.resume}; use auto, never or a checkpoint folder"
            )
        return recipe.train.resume
    last = last_checkpoint(folder / "checkpoints")
    if last is None:
        return None
    if recipe.train.resume == "never":
        raise RecipeError(f"{folder}: holds an unfinished run and train.resume is never; remove the folder or use auto")
    started_with = (folder / "recipe.yaml").read_text() if (folder / "recipe.yaml").exists() else ""
    if _without_resume(started_with) != _without_resume(resolved_yaml(recipe)):
        raise RecipeError(
            f"{folder}: holds an unfinished run of a different recipe; choose another output or remove it"
        )
    return last


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, or None: a run may be killed while it saves."""
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]  # this file comes last
    return str(max(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))) if whole else None


def _without_resume(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.strip().startswith("resume:")]


def write_facts(folder: Path, recipe: Recipe, family: Family) -> None:
    """recipe.yaml, versions.json and the family beside the adapter to come."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(resolved_yaml(recipe))
    (folder / "versions.json").write_text(json.dumps(environment(), indent=2) + "\n")
    write_family(folder, family)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter at the top of the run folder, weights last, so that their presence means "finished".

    Raises:
        ValueError: a weight is not finite; nothing is written.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(f"{name}: not finite after training; the adapter is not saved, checkpoints are kept")
    temporary = folder / ".adapter"
    model.save_pretrained(str(temporary))
    (temporary / "README.md").unlink(missing_ok=True)  # PEFT's template card; ours is written by publishing
    for file in sorted(temporary.iterdir(), key=lambda f: f.name == ADAPTER_FILE):
        file.rename(folder / file.name)
    temporary.rmdir()


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl; lines after the checkpoint a run resumes from are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget steps that will be done again."""
        if self.path.exists():
            kept = [line for line in self._lines() if json.loads(line)["step"] <= state.global_step]
            self.path.write_text("".join(kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One JSON object a line."""
        if state.is_world_process_zero and logs and "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step} | logs) + "\n")

    def _lines(self) -> Iterator[str]:
        yield from self.path.read_text().splitlines(keepends=True)
