"""Suites: which tasks and arms an evaluation runs, from a YAML file of this package or a user's own.

mage-tune eval RUN --suite quick
mage-tune eval --suites                       # what there is
mage-tune eval RUN --suite my.yaml --set tasks.0.documents=4
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mage_tune.evals.continuation import ContinuationTask
from mage_tune.evals.needles import NeedleTask
from mage_tune.evals.tasks import Arm, Defaults, Task
from mage_tune.evals.text_tasks import LayersTask, RulesTask, TextTask
from mage_tune.recipe import RecipeError, Suite, load_suite
from mage_tune.recipe_schema import (
    BenchmarkSpec,
    ContinueSpec,
    CopySpec,
    LayersSpec,
    NeedlesSpec,
    RulesSpec,
    TaskSpec,
    TextSpec,
)

FOLDER = Path(__file__).parent / "suite_files"


@dataclass(frozen=True)
class Plan:
    """What is to be run on each side."""

    suite: str | None
    """None: the run's own recipe."""
    settings: dict[str, Any]
    tasks: list[Task]
    readings: list[Arm]
    """Of the base model; the adapter's are the same."""


def shipped_suites() -> dict[str, Path]:
    """Name -> file of the suites that come with the package, the smallest first."""
    found = {file.stem: file for file in FOLDER.glob("*.yaml")}
    return {name: found[name] for name in sorted(found, key=lambda name: (found[name].stat().st_size, name))}


def find_suite(name: str) -> Path:
    """The file of a suite given by name or path.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    shipped, path = shipped_suites(), Path(name)
    if name in shipped:
        return shipped[name]
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise RecipeError(f"{name}: no such suite file; shipped suites are {', '.join(shipped)}")
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"unknown suite {name!r}; {hint}Shipped are {', '.join(shipped)}, or give a .yaml file")


def read_suite(name: str, overrides: Sequence[str] = (), text: str | None = None) -> Plan:
    """A suite's tasks and arms.

    Args:
        name: of a shipped suite, or a file.
        overrides: "key=value" of the suite.
        text: held-out text for a suite that names none.

    Raises:
        RecipeError: there is no such suite, or it cannot be.
    """
    path = find_suite(name)
    suite = load_suite(path, overrides)
    defaults = Defaults(suite.seed, suite.threshold, suite.text or text)
    readings = list(arms_of(suite))
    tasks = [task for spec in suite.tasks for task in build(spec, suite, defaults)]
    refuse_twins("rules", "arm", [arm.name for arm in readings])
    refuse_twins("tasks", "task", [task.name for task in tasks])
    settings = suite.model_dump(mode="json") | {"text": defaults.text}
    return Plan(path.stem, settings, tasks, readings)


def arms_of(suite: Suite) -> Iterator[Arm]:
    """Exact attention, then every rule at every budget.

    Raises:
        RecipeError: a rule cannot be; names the key.
    """
    yield Arm()
    for number, spec in enumerate(suite.rules):
        for budget in spec.budgets:
            try:
                yield Arm("base", spec.rule, budget, tuple(spec.options.items()), suite.dense_layers)
            except (TypeError, ValueError) as error:
                raise RecipeError(f"suite: key 'rules[{number}]': {error}") from None


def build(spec: TaskSpec, suite: Suite, defaults: Defaults) -> list[Task]:
    """The tasks of one entry of a suite."""
    budgets = [budget for rule in suite.rules for budget in rule.budgets]
    match spec:
        case BenchmarkSpec():
            from mage_tune.evals.harness import build_tasks

            return list(build_tasks(spec.kind, dict(spec.options), defaults))
        case NeedlesSpec():
            return [
                NeedleTask(
                    defaults,
                    kind,
                    name=f"{spec.name}_{kind}",
                    lengths=spec.lengths,
                    depths=spec.depths,
                    needles=spec.needles,
                    asked=spec.asked,
                    questions=spec.questions,
                    steps=spec.steps,
                )
                for kind in spec.needle_kinds
            ]
        case CopySpec() | ContinueSpec():
            window: dict[str, Any] = {"name": spec.name, "context": spec.context, "documents": spec.documents}
            return [ContinuationTask(defaults, spec.kind, steps=spec.steps, **window)]
    probe: dict[str, Any] = {
        "name": spec.name,
        "context": spec.context,
        "documents": spec.documents,
        "blocks": spec.blocks,
        "dense_layers": suite.dense_layers,
    }
    match spec:
        case TextSpec():
            return [TextTask(defaults, budgets=spec.budgets, **probe)]
        case RulesSpec():
            return [RulesTask(defaults, budgets=budgets, **probe)]
        case LayersSpec():
            return [LayersTask(defaults, budgets=[spec.budget], **probe)]


def refuse_twins(key: str, what: str, names: Sequence[str]) -> None:
    """Make sure that names tell things apart.

    Raises:
        RecipeError: two are the same.
    """
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"suite: key '{key}': {what} {name!r} is there twice; give one another name or remove it")
