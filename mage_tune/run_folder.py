"""A run folder: what is written into it, in which order, and when a run may go on from it.

    recipe.yaml  versions.json  mage_tune.json  metrics.jsonl  checkpoints/
    adapter_config.json  adapter_model.safetensors

The adapter's weights come last: their presence means that the run has finished. A checkpoint is written under
`checkpoints/.saving` and renamed when all of it is on the disk, so `checkpoint-N` is whole or not there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from mage_tune.backbone import write_family
from mage_tune.environment import environment
from mage_tune.families import Family
from mage_tune.recipe import Recipe, RecipeError, load_recipe, resolved_yaml
from mage_tune.stability import NonFiniteError

ADAPTER_FILE = "adapter_model.safetensors"
"""Its presence at the top of a run folder means the run has finished."""

STAGING = ".saving"
"""Where a checkpoint lies while it is written; hidden names in `checkpoints/` are swept away by the next save."""

DECIDES_NOTHING = {
    *("name", "output", "eval", "data.workers", "train.resume", "train.sample_every", "train.save_every"),
    *("train.keep_checkpoints", "train.log_every", "train.trackers", "train.checkpointing", "train.offload"),
}
"""Keys of a recipe, or whole sections, that do not change what comes out of its run: a run may go on with others."""

WRITE_FAILED = ("PytorchStreamWriter", "iostream error", "inline_container.cc")
"""Texts of the RuntimeErrors with which torch.save reports a write that failed; which one depends on where."""


def prepare_folder(folder: Path, recipe: Recipe) -> str | None:
    """Make the run folder, or find the checkpoint to go on from.

    Raises:
        RecipeError: see `train`.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RecipeError(f"output: {there} is a file; name a folder, which may be a new one")
    if (folder / ADAPTER_FILE).exists():
        raise RecipeError(f"{folder}: holds a finished run; choose another output, or remove the folder to train again")
    if recipe.train.resume not in ("auto", "never"):
        if not (Path(recipe.train.resume) / "trainer_state.json").is_file():
            raise RecipeError(
                f"train.resume: no checkpoint at {recipe.train.resume}; use auto, never or a checkpoint folder"
            )
        return recipe.train.resume
    last = last_checkpoint(folder / "checkpoints")
    sweep(folder)
    sweep(folder / "checkpoints")
    if last is None:
        return None
    if recipe.train.resume == "never":
        raise RecipeError(f"{folder}: holds an unfinished run and train.resume is never; remove the folder or use auto")
    if not (folder / "recipe.yaml").exists():
        raise RecipeError(f"{folder}: holds checkpoints but no recipe.yaml to compare with; choose another output")
    differing = first_difference(load_recipe(folder / "recipe.yaml").model_dump(), recipe.model_dump())
    if differing is not None:
        key, theirs, ours = differing
        raise RecipeError(
            f"{folder}: holds an unfinished run of a different recipe: {key} was {theirs!r} and is {ours!r} now; write "
            f"it as it was, choose another output, or go on all the same with --set train.resume={last}"
        )
    return last


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, or None: a run may be killed while it saves."""
    found = checkpoints(folder)
    return str(found[-1]) if found else None


def kept(folder: Path) -> str:
    """What a run that ends early leaves in its folder of checkpoints, for messages."""
    last = last_checkpoint(folder)
    return f"the last checkpoint is {last}" if last else "there is no checkpoint yet"


def checkpoints(folder: Path) -> list[Path]:
    """Every whole checkpoint, oldest first."""
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]  # the Trainer's last file
    return sorted(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))


def publish_checkpoint(staged: Path, folder: Path, keep: int) -> None:
    """Give a checkpoint that was written aside its name in `folder`, then let the oldest ones beyond `keep` go.

    A process killed at any moment, or a machine that loses power, leaves whole checkpoints only.
    """
    _sync(staged)
    final = folder / staged.name
    if final.exists():  # of a run that went on from an older checkpoint
        _discard(final)
    staged.rename(final)
    _sync_entry(folder)
    for old in checkpoints(folder)[:-keep]:
        _discard(old)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove the folders that a failed or killed save left behind."""
    for left in folder.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def saving(what: str, folder: Path, checkpoints: Path) -> Iterator[None]:
    """Around a save into `folder`: where a write fails, takes back the space of what it has written and says so.

    Raises:
        OSError: in place of whichever error told of the write.
    """
    try:
        yield
    except Exception as error:
        if not write_failed(error):
            raise
        free = shutil.disk_usage(folder).free
        sweep(folder)  # a full disk needs the space
        cause = str(error) if free >= 2**20 else os.strerror(errno.ENOSPC)  # torch does not say
        raise OSError(
            f"{what} could not be written ({cause}; {free / 2**30:.1f} GiB free); {kept(checkpoints)}"
        ) from error


def write_failed(error: BaseException | None) -> bool:
    """Whether the system refused a write: this error says so, or one in whose handling it was raised."""
    while error is not None:
        is_torch = isinstance(error, RuntimeError) and any(sign in str(error) for sign in WRITE_FAILED)
        if is_torch or isinstance(error, (OSError, SafetensorError)):
            return True
        error = error.__context__
    return False


def _discard(checkpoint: Path) -> None:
    """Take a checkpoint's name away before its files, as a half-deleted one looks whole."""
    hidden = checkpoint.with_name(f".old-{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Wait until a folder and all in it are on the disk."""
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_whole(path: Path, text: str) -> None:
    """Replace a file's content; a reader, even after a crash, finds the old or the new one."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    _sync_entry(temporary)
    temporary.replace(path)


def first_difference(theirs: Any, ours: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two recipes, as plain data, would train something else, and both of its values."""
    if theirs == ours or key in DECIDES_NOTHING:
        return None
    inner: Iterable[Any] = ()
    if isinstance(theirs, dict) and isinstance(ours, dict):
        inner = theirs | ours
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        inner = range(len(ours))
    for part in inner:
        was, now = (value.get(part) if isinstance(value, dict) else value[part] for value in (theirs, ours))
        found = first_difference(was, now, f"{key}.{part}".removeprefix("."))
        if found is not None:
            return found
    return None if inner else (key, theirs, ours)


def write_facts(folder: Path, recipe: Recipe, family: Family) -> None:
    """recipe.yaml, versions.json and the family beside the adapter to come."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / "recipe.yaml", resolved_yaml(recipe))
    weights = {} if recipe.model.random_weights is None else {"weights": "RANDOM, of the recipe's shape"}
    _write_whole(folder / "versions.json", json.dumps(environment() | weights, indent=2) + "\n")
    write_family(folder, family)


def save_adapter(model: PeftModel, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the adapter at the top of the run folder, weights last, so that their presence means "finished".

    Args:
        model: the model with the adapter.
        folder: run folder.
        state: what `trained_weights` gathered, where an engine holds the model in parts.

    Raises:
        NonFiniteError: a weight is not finite; nothing is written.
        OSError: it could not be written, for example on a full disk.
    """
    state = trained_weights(model) if state is None else state
    refuse_non_finite(state)
    temporary = folder / ".adapter"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process killed right here
    with saving("the adapter", folder, folder / "checkpoints"):
        model.save_pretrained(str(temporary), state_dict=state)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's template card; ours is written by publishing
        _sync(temporary)
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == ADAPTER_FILE):
            file.rename(folder / file.name)
        _sync_entry(folder)
        temporary.rmdir()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> weight of everything that is trained, whole, also where an engine splits weights over processes.

    Every process has to call it.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if any(hasattr(weight, "ds_id") for weight in trained.values()):  # DeepSpeed ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained.values())):
            return {name: weight.detach().cpu().clone() for name, weight in trained.items()}
    return {name: whole(weight.detach()) for name, weight in trained.items()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 may have split, put together; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refuse_non_finite(weights: dict[str, Tensor]) -> None:
    """Make sure that every trained weight is finite.

    Raises:
        NonFiniteError: one is not; names it.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise NonFiniteError(
                f"{name}: not finite; the adapter is not saved, earlier checkpoints are kept; lower train.learning_rate"
            )


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl; lines after the checkpoint a run resumes from are dropped first.

    Args:
        path: the file.
        is_random: every line says that the model's weights are random.
    """

    def __init__(self, path: Path, is_random: bool = False) -> None:
        self.path = path
        self.marks = {"weights": "random"} if is_random else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget steps that will be done again."""
        if state.is_world_process_zero and self.path.exists():
            whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
            _write_whole(self.path, "".join(kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One JSON object a line."""
        if state.is_world_process_zero and logs and "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step} | logs | self.marks) + "\n")
