"""What results.json holds, made from finished arms.

settings, environment, suite     what was measured, with what
tasks, skipped                   every task with its settings and its prompts' digest; why one could not run
metrics                          every number: key -> task, metric, arm, label, unit, which way is better
arms        [side][key]          mean with its 95 % interval over independent units
paired      [key]                adapter - base on the same units: interval, wins, ties, losses
against_exact [side][key]        a sparse arm - the exact arm, likewise
values      [side][key]          the value of every unit
records     [side][task][arm]    every sample: prompt id, output, forwards per block, facts
timings                          seconds and dates: all that differs between two runs of the same evaluation
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mage_tune.evals.stats import estimate, paired
from mage_tune.evals.store import StoredArm
from mage_tune.evals.tasks import Arm, Measure, Side, Task

FORMAT = 2
Stored = Mapping[tuple[Side, str, str], StoredArm]
"""(side, task, reading) -> what is there."""


def summarise(
    stored: Stored,
    tasks: Sequence[Task],
    readings: Sequence[Arm],
    *,
    sides: Sequence[Side],
    suite: str | None,
    settings: dict[str, Any],
    environment: dict[str, Any],
    skipped: dict[str, str],
    prompts: dict[str, str],
    devices: int = 1,
) -> dict[str, Any]:
    """Estimates of every arm, paired differences, and everything they came from.

    Args:
        stored: every (side, task, reading) that ran.
        prompts: task -> digest of its prompts.
        devices: processes that the arms were shared out over.
    """
    metrics: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, list[Any]]] = {side: {} for side in sides}
    for task, arm, key, metric in numbers(stored, tasks, readings, sides[0]):
        assert key not in metrics, key
        metrics[key] = describe(task, metric, arm)
        for side in sides:
            values[side][key] = list(stored[side, task.name, arm.reading].metrics[metric])
    paired_up = {}
    if len(sides) == 2:
        before, after = sides
        paired_up = {key: difference(values[after][key], values[before][key], info) for key, info in metrics.items()}
    return {
        "format": FORMAT,
        "suite": suite,
        "settings": settings,
        "environment": environment,
        "tasks": {task.name: task_facts(task, stored, readings, sides[0], prompts) for task in tasks},
        "skipped": skipped,
        "metrics": metrics,
        "arms": {
            side: {key: asdict(estimate(as_array(found))) for key, found in values[side].items()} for side in sides
        },
        "paired": paired_up,
        "against_exact": {side: against_exact(metrics, values[side]) for side in sides},
        "values": values,
        "records": {side: records(stored, tasks, readings, side) for side in sides},
        "timings": timings(stored, devices),
    }


def numbers(
    stored: Stored, tasks: Sequence[Task], readings: Sequence[Arm], side: Side
) -> Iterator[tuple[Task, Arm, str, str]]:
    """Every number of one side: (task, arm, key, metric)."""
    for task in tasks:
        for arm in readings:
            if task.takes(arm):
                for metric in stored[side, task.name, arm.reading].metrics:
                    yield task, arm, task.key(metric, arm), metric


def describe(task: Task, metric: str, arm: Arm) -> dict[str, Any]:
    """How a number is called and read."""
    name, _, budget = metric.partition("@")
    measure = task.measures.get(metric) or task.measures.get(name) or Measure(metric)
    return {
        "task": task.name,
        "kind": task.kind,
        "metric": metric,
        "reading": arm.reading,
        "shown": shown_reading(arm),
        "label": measure.label.replace("{k}", budget),
        "unit": measure.unit,
        "higher_is_better": measure.higher_is_better,
        "is_cost": measure.is_cost,
        "meaning": measure.meaning,
        "is_headline": metric == task.headline,
    }


def shown_reading(arm: Arm) -> str:
    """ "exact", "mage k=64"."""
    return arm.reading if arm.budget is None else arm.reading.replace(f" {arm.budget}", f" k={arm.budget}", 1)


def as_array(values: Sequence[Any]) -> np.ndarray:
    """Values of units: bool stays bool (shares), everything else is float."""
    is_share = all(isinstance(value, bool) for value in values)
    return np.array(values, dtype=bool if is_share else np.float64)


def difference(after: Sequence[Any], before: Sequence[Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """after - before, unit by unit, as JSON."""
    return asdict(paired(as_array(after), as_array(before), higher_is_better=bool(info["higher_is_better"])))


def against_exact(metrics: Mapping[str, Mapping[str, Any]], values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Every number of a sparse arm against the same of exact attention, where there is one."""
    exact = {(info["task"], info["metric"]): key for key, info in metrics.items() if info["reading"] == "exact"}
    found = {}
    for key, info in metrics.items():
        other = exact.get((info["task"], info["metric"]))
        if info["reading"] != "exact" and other is not None and len(values[key]) == len(values[other]):
            found[key] = difference(values[key], values[other], info)
    return found


def task_facts(
    task: Task, stored: Stored, readings: Sequence[Arm], side: Side, prompts: Mapping[str, str]
) -> dict[str, Any]:
    """What a task was, for the end of the report and for comparisons."""
    arms = [arm for arm in readings if task.takes(arm)]
    first = stored[side, task.name, arms[0].reading]
    return {
        "title": task.title,
        "kind": task.kind,
        "settings": task.settings,
        "decoding": first.settings,
        "prompts": prompts[task.name],
        "samples": len(first.records),
        "arms": {arm.reading: arm.settings() for arm in arms},
        "sparse_share": {
            arm.reading: share
            for arm in arms
            if (share := sparse_share(stored[side, task.name, arm.reading])) is not None
        },
    }


def sparse_share(arm: StoredArm) -> float | None:
    """Share of the denoising forwards that were sparse, where a task says it."""
    shares = [record["facts"]["sparse_share"] for record in arm.records if "sparse_share" in record["facts"]]
    return float(np.mean(shares)) if shares else None


def records(stored: Stored, tasks: Sequence[Task], readings: Sequence[Arm], side: Side) -> dict[str, Any]:
    """[task][reading] -> records of every sample."""
    return {
        task.name: {arm.reading: stored[side, task.name, arm.reading].records for arm in readings if task.takes(arm)}
        for task in tasks
    }


def timings(stored: Stored, devices: int) -> dict[str, Any]:
    """When every arm was finished and how long its samples took."""
    return {
        "processes": devices,
        "seconds": {" | ".join(name): round(sum(arm.seconds), 3) for name, arm in stored.items()},
        "seconds_per_sample": {
            " | ".join(name): round(float(np.mean(arm.seconds)), 4) for name, arm in stored.items() if arm.seconds
        },
        "finished": {" | ".join(name): arm.finished for name, arm in stored.items()},
    }
