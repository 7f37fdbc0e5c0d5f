"""Finished arms on disk: one file per (arm, task), written whole or not at all, found again by what it depends on.

A file's name ends in the fingerprint of everything its content depends on: task, settings, prompts, arm, weights,
family, dtype and toolkit version. Another setting is another file, so nothing is ever overwritten by mistake, and an
evaluation that is run again, or goes on after an interruption, reads what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mage_tune
from mage_tune.backbone import family_facts
from mage_tune.evals.tasks import Arm, Task, TaskResult
from mage_tune.lm import BlockDiffusionLM

FORMAT = 1
"""Of a stored arm; a change makes older files strangers."""
SAMPLED = 2048
"""Elements of every weight that the digest of a model looks at."""


@dataclass(frozen=True)
class StoredArm:
    """What one arm found on one task."""

    metrics: dict[str, list[Any]]
    records: list[dict[str, Any]]
    """As in `tasks.SampleRecord`, without the seconds."""
    settings: dict[str, Any]
    seconds: list[float]
    """Of every sample."""
    finished: str
    """When, in UTC."""


class Store:
    """A folder of finished arms."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, task: Task, arm: Arm, fingerprint: str) -> Path:
        """The file of an arm."""
        words = re.sub(r"[^\w.=-]+", "_", f"{task.name}--{arm.name}")[:100]
        return self.folder / f"{words}--{fingerprint[:16]}.json"

    def read(self, task: Task, arm: Arm, fingerprint: str) -> StoredArm | None:
        """What is there of an arm; None when it has to be run, also where a file is damaged."""
        try:
            found = json.loads(self.path(task, arm, fingerprint).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        if not isinstance(found, dict) or found.get("fingerprint") != fingerprint:
            return None
        return StoredArm(**found["arm"])

    def write(self, task: Task, arm: Arm, fingerprint: str, result: TaskResult) -> StoredArm:
        """Keep a finished arm.

        Raises:
            OSError: it cannot be written, the disk being full, say; what was there before stays.
        """
        records = [asdict(record) for record in result.records]
        seconds = [float(record.pop("seconds")) for record in records]
        metrics = {name: list(values) for name, values in result.metrics.items()}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        arm_found = {
            "metrics": metrics,
            "records": records,
            "settings": dict(result.settings),
            "seconds": seconds,
            "finished": now,
        }
        whole = {"fingerprint": fingerprint, "task": task.name, "name": arm.name, "arm": arm_found}
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(whole, indent=1)
        write_whole(self.path(task, arm, fingerprint), text + "\n")
        return StoredArm(**json.loads(text)["arm"])  # as a later run will read it


def write_whole(path: Path, text: str) -> None:
    """Replace a file's content: a reader finds the old or the new one, also after a crash or on a full disk.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(task: Task, arm: Arm, prompts: str, weights: str, lm: BlockDiffusionLM) -> str:
    """Digest (sha256, hex) of everything a stored arm depends on.

    Args:
        prompts: what `task.prepare` returned.
        weights: what `weights_digest` returned for the arm's side.
    """
    facts = {
        "format": FORMAT,
        "mage_tune": mage_tune.__version__,
        "task": [task.kind, task.name, task.settings],
        "prompts": prompts,
        "arm": [arm.model, arm.settings()],
        "weights": weights,
        "family": family_facts(lm.family),
        "dtype": str(lm.dtype),
    }
    return sha256(facts)


def sha256(facts: Mapping[str, Any] | Sequence[Any]) -> str:
    """Digest of JSON-able facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module, *, with_adapter: bool) -> str:
    """Digest of a model's weights by name, shape and a sample of their values, wherever they were loaded from.

    Args:
        with_adapter: whether the adapter counts; without it, a wrapped and a bare base are the same.
    """
    total = hashlib.sha256()
    for name, value in sorted((_plain_name(name), value) for name, value in model.state_dict().items()):
        is_adapter = ".lora_" in name or ".modules_to_save." in name or ".trainable_tokens" in name
        if is_adapter and not with_adapter:
            continue
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
        total.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        total.update(sample.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
