"""What an evaluation is made of: arms, tasks, and what a task gives back.

An *arm* is the base model or its adapter, under one selection rule with one budget. A *task* has prompts, the same for
every arm, and turns an arm into one number per metric and sample. The runner (`evals.run`) runs tasks over arms, keeps
every finished (arm, task) on disk, pairs samples by their order, and knows nothing else of either.

    task.prepare(lm)             once per process, before anything is measured: reads data, makes prompts
    task.run(lm, arm, advance)   per arm; `advance()` after each of its `task.samples` samples

Errors that a person can mend are `ValueError`s of one line, raised by `prepare`; `Skipped` says why a task cannot run
here at all (no network, a library that is missing), and the report repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from mage_tune.decode.layer_budgets import rule_options
from mage_tune.decode.rules import RULES, Rule, make_rule
from mage_tune.decode.steps import Levers
from mage_tune.lm import BlockDiffusionLM

Side = Literal["base", "adapter"]
Advance = Callable[[], None]
SHOWN = 600
"""Characters of an output that a record keeps."""


class Skipped(Exception):
    """A task cannot run here, through no fault of the settings; its text is the reason, for the report."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: base model or adapter, read with one kind of attention.

    Args:
        model: "base" (adapter switched off) or "adapter".
        rule: a selection rule of `decode.rules`; "exact" sees every key.
        budget: keys kept per KV head; None for exact.
        options: the rule's other options (sinks, recent, ...) and the levers refresh, reselect_at and residual, as
            (name, value) pairs; layer_budgets may be a file of `mage-tune budgets`.
        dense_layers: first layers that stay exact, the same for all arms of a suite and so not in an arm's name; an
            option of that name comes before it.

    Raises:
        ValueError: no such rule or option, or one that contradicts another.
    """

    model: Side = "base"
    rule: str = "exact"
    budget: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    dense_layers: int = 2

    def __post_init__(self) -> None:
        if self.rule != "exact" and self.budget is None:
            raise ValueError(f"rule {self.rule!r} needs a budget of keys per KV head")
        self.attention()
        _ = self.levers

    @property
    def reading(self) -> str:
        """The kind of attention alone: "exact", "mage 128", "mage 128 recent=16"; what both sides are paired by."""
        words = [self.rule] if self.budget is None else [self.rule, str(self.budget)]
        usual = {f.name: f.default for f in fields(RULES[self.rule])}
        shown = {name: Path(value).name if is_file(name, value) else value for name, value in self.options}
        return " ".join(words + [f"{name}={value}" for name, value in shown.items() if usual.get(name) != value])

    @property
    def name(self) -> str:
        """ "adapter mage 128": unique among the arms of an evaluation."""
        return f"{self.model} {self.reading}"

    def settings(self) -> dict[str, Any]:
        """Everything about the attention, as JSON values."""
        found = self.attention().settings() | self.levers.settings()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def attention(self) -> Rule:
        """The selection rule, for `lm.generate(attention=...)`."""
        levers = {f.name for f in fields(Levers)}
        chosen: dict[str, Any] = {"budget": self.budget, "dense_layers": self.dense_layers}
        chosen |= {name: value for name, value in self.options if name not in levers}
        for name, value in self.options:
            if is_file(name, value):
                chosen |= rule_options(value, self.rule, self.budget, chosen["dense_layers"])
        return make_rule(self.rule, **chosen)

    @property
    def levers(self) -> Levers:
        """What is done on top of the rule."""
        known = {f.name for f in fields(Levers)}
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in self.options if n in known}
        return Levers(**given)

    def generate_options(self) -> dict[str, Any]:
        """Keyword arguments of `lm.generate` that make it read as this arm does."""
        return {"attention": self.attention(), **self.levers.settings()}


def is_file(option: str, value: Any) -> bool:
    """Whether an option of an arm names a file of layer budgets."""
    return option == "layer_budgets" and isinstance(value, str)


@dataclass(frozen=True)
class Measure:
    """What a metric is called, which way is better, and what it means."""

    label: str
    higher_is_better: bool = True
    meaning: str = ""
    unit: str = "samples"
    """What one value belongs to, in the plural."""
    is_cost: bool = False
    """Speed rather than quality (forwards per block): shown apart."""


FORWARDS = Measure(
    "forwards per block", False, "denoising forward passes per block written: fewer is faster", is_cost=True
)


@dataclass(frozen=True)
class SampleRecord:
    """One sample under one arm, for people: what was asked and said, and what it cost."""

    sample: str
    """Id of the prompt, the same in every arm."""
    output: str = ""
    """Shortened to `SHOWN` characters."""
    forwards_per_block: float | None = None
    seconds: float = 0.0
    """Wall time; kept apart from everything else, as it differs from run to run."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else the report may want: expected values, depth, length, per-layer numbers. JSON-able."""


@dataclass(frozen=True)
class TaskResult:
    """What a task found under one arm.

    Attributes:
        metrics: name -> one value per sample, in order of samples; bool for right or wrong. Metrics of one task may
            differ in length from each other (per question, per value), never from arm to arm.
        records: one per sample, in the same order.
        settings: decoding settings as they were in the end (`Generation.settings`), JSON-able.
    """

    metrics: Mapping[str, Sequence[float | bool]]
    records: list[SampleRecord]
    settings: dict[str, Any] = field(default_factory=dict)


class Task:
    """Base of every task: prompts that are the same for all arms, and how an arm is scored on them.

    Subclasses set `name` (unique in a suite) and `settings` (JSON-able; all that the result depends on, apart from
    model, arm and prompts), and write `prepare` and `run`.
    """

    kind: ClassVar[str] = ""
    measures: Mapping[str, Measure] = {}
    """Metric -> how it is shown; one without an entry is shown under its own name, higher being better."""
    headline: str | None = None
    """The metric that sums the task up, if there is one."""
    name: str
    title: str
    """For headings."""
    settings: dict[str, Any]
    samples: int = 0
    """Calls of `advance` per arm; known after `prepare`."""

    def key(self, metric: str, arm: Arm) -> str:
        """What a number is called in results.json: the same for base and adapter."""
        return f"{self.name}.{metric}@{arm.reading}"

    def takes(self, arm: Arm) -> bool:
        """Whether the task says anything about such an arm; one that tries all budgets itself wants only "exact"."""
        return True

    def prepare(self, lm: BlockDiffusionLM) -> str:
        """Read data and make prompts; measures nothing.

        Returns:
            Digest (sha256, hex) of the prompts and what is expected of them: a finished arm is kept only while this,
            the settings and the model stay the same.

        Raises:
            ValueError: one line about what the person should change.
            Skipped: the task cannot run here.
        """
        raise NotImplementedError

    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Score one arm on every sample. The adapter is on or off already, as the arm wants it."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of memory kept for further arms: called when the model changes sides, and at the end."""
        return None


@dataclass(frozen=True)
class Defaults:
    """What a suite says once for all of its tasks."""

    seed: int
    threshold: float
    """Confidence above which a decoded token is accepted."""
    text: str | None = None
    """Held-out text."""


# A suite's `kind: lm_eval | ruler | longbench` entries are built by `mage_tune.evals.harness.build_tasks(kind, options,
# defaults) -> list[Task]`, options being the entry's other keys as written (unknown ones are its ValueError to raise).


def shortened(text: str | None, length: int = SHOWN) -> str:
    """The beginning of an output."""
    text = text or ""
    return text if len(text) <= length else f"{text[:length]}…"


def bools(values: Sequence[Any]) -> list[bool]:
    """Python's own bool, which JSON keeps apart from numbers."""
    return [bool(value) for value in values]


def floats(values: Sequence[Any]) -> list[float]:
    """Python's own float."""
    return [float(cast(float, value)) for value in values]
