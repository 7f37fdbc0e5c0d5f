"""Public benchmarks: lm-evaluation-harness with our model in it, RULER with a sample cache, LongBench.

    likelihood           log-probability of a continuation under block diffusion
    model                the model as lm-eval sees one; importing it registers "mage_tune" there
    lm_eval_task         any task of lm-eval as a task of ours
    ruler                RULER's samples, made once and kept
    longbench_metrics    LongBench's scores
    longbench            LongBench's prompts, truncation and data

Arrows: lm_eval_task -> model -> likelihood; ruler -> lm_eval_task; longbench -> longbench_metrics. lm-eval comes with
the extra `eval`; without it every benchmark is skipped and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from mage_tune.evals.harness.options import (
    LONGBENCH,
    RULER,
    LmEvalOptions,
    LongBenchOptions,
    RulerOptions,
    check_names,
    read_options,
)
from mage_tune.evals.tasks import Advance, Arm, Defaults, Skipped, Task, TaskResult
from mage_tune.lm import BlockDiffusionLM

if find_spec("lm_eval") is not None:
    from mage_tune.evals.harness.model import HarnessLM as HarnessLM


def build_tasks(kind: str, options: Mapping[str, Any], defaults: Defaults) -> list[Task]:
    """The tasks of a suite's entry `kind: lm_eval | ruler | longbench`.

    Args:
        kind: which benchmark.
        options: the entry's other keys, as written; `options.LmEvalOptions` and its neighbours say which there are.
        defaults: of the suite.

    Raises:
        ValueError: an option is unknown or cannot be, or a task's name is.
    """
    given = dict(options)
    if kind == "lm_eval":
        lm_eval = read_options(kind, LmEvalOptions, given)
        if find_spec("lm_eval") is None:
            return [Missing(kind, name, defaults) for name in lm_eval.tasks]
        from mage_tune.evals.harness.lm_eval_task import LmEvalTask

        return [
            task
            for name in lm_eval.tasks
            for task in (
                ruler_tasks([name], lm_eval, defaults)
                if name in RULER
                else [LmEvalTask(name, lm_eval, defaults, lm_eval.shots)]
            )
        ]
    if kind == "ruler":
        ruler = read_options(kind, RulerOptions, given)
        check_names("RULER task", ruler.tasks, RULER)
        if find_spec("lm_eval") is None:
            return [Missing(kind, "ruler", defaults)]
        return ruler_tasks(ruler.tasks, ruler, defaults)
    if kind == "longbench":
        longbench = read_options(kind, LongBenchOptions, given)
        names = list(LONGBENCH) if longbench.tasks == "all" else longbench.tasks
        check_names("LongBench task", names, LONGBENCH)
        if find_spec("lm_eval") is None:
            return [Missing(kind, "longbench", defaults)]
        from mage_tune.evals.harness.longbench import LongBenchTask

        return [LongBenchTask(name, longbench, defaults) for name in names]
    raise ValueError(f"unknown benchmark {kind!r} (known: lm_eval, ruler, longbench)")


def ruler_tasks(names: list[str], options: LmEvalOptions | RulerOptions, defaults: Defaults) -> list[Task]:
    """Each task at each length."""
    from mage_tune.evals.harness.ruler import RulerTask

    return [RulerTask(name, length, options, defaults) for name in names for length in options.lengths]


class Missing(Task):
    """Stands for a benchmark whose library is not installed."""

    def __init__(self, kind: str, name: str, defaults: Defaults) -> None:
        self.kind = kind  # type: ignore[misc]
        self.name = self.title = name
        self.settings = {"seed": defaults.seed}

    def prepare(self, lm: BlockDiffusionLM) -> str:
        """Say what is missing."""
        raise Skipped(f"{self.name} needs lm-evaluation-harness: pip install 'mage_tune[eval]'")

    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Never reached."""
        raise NotImplementedError
