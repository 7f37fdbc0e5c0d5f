"""What an evaluation found, for people: tables on the terminal, PNG plots, and one self-contained report.html.

Everything here reads the dictionary that `mage_tune.evals.run.summarise` makes (eval/results.json) and measures
nothing itself. What a number is called, which way is better and what it means is said once, in `TEXT` and `NEEDLES`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mage_tune.evals.needles import TASKS
from mage_tune.evals.plots import Plot, draw_plots
from mage_tune.evals.stats import Estimate

Result = dict[str, Any]
Verdict = Literal["better", "worse", "unclear", "too few"]

FEWEST_UNITS = 6
"""Below this a difference is never called clear: five windows that agree are still chance one time in sixteen."""
SAMPLES = 6
"""Sample answers shown per needle task."""


@dataclass(frozen=True)
class Metric:
    """How a number is called, which way is better, and what it means."""

    label: str
    subject: str
    higher_is_better: bool
    meaning: str


TEXT = {
    "recall": Metric(
        "recall@{k}",
        "Recall@{k}",
        True,
        "share of a later step's own top-k prefix keys that the all-[MASK] step had already chosen",
    ),
    "mass": Metric(
        "mass kept@{k}",
        "The attention mass kept at k = {k}",
        True,
        "share of a later step's attention over the prefix that falls on the k keys chosen at the all-[MASK] step",
    ),
    "query_cosine": Metric(
        "query cosine",
        "The query cosine",
        True,
        "cosine of the block-average queries of the all-[MASK] step and of a later step",
    ),
    "ce_exact": Metric(
        "CE exact",
        "Cross-entropy with exact attention",
        False,
        "cross-entropy of the still masked tokens, in nats per token, when every step sees the whole prefix",
    ),
    "ce_mask": Metric(
        "CE mask-{k}",
        "Cross-entropy with keys chosen at the all-[MASK] step (k = {k})",
        False,
        "the same when later steps see only the k keys chosen at the all-[MASK] step",
    ),
    "ce_oracle": Metric(
        "CE oracle-{k}",
        "Cross-entropy with keys chosen at the same step (k = {k})",
        False,
        "the same with k keys chosen at the very step that uses them: the best that this selection could do",
    ),
    "ce_gap": Metric(
        "CE gap@{k}",
        "The CE gap at k = {k} (mask-k less exact, in nats)",
        False,
        "CE mask-k less CE exact: what it costs to choose keys at the all-[MASK] step",
    ),
}
"""Text probes: key in results.json up to its "@k" -> metric, in the order they are shown."""

NEEDLES = {
    "": Metric(
        "right answers",
        "The share of {task}-needle questions answered right ({attention})",
        True,
        "share of questions whose answer has every value asked for",
    ),
    "_found": Metric(
        "values found",
        "The share of values found in {task}-needle questions ({attention})",
        True,
        "share of the values asked for that are in the answer",
    ),
    "_forwards": Metric(
        "forwards per block",
        "The number of forwards per block in {task}-needle questions ({attention})",
        False,
        "denoising forward passes per block written: fewer is faster",
    ),
}
"""Needle tasks: what follows "task_attention" in a key of results.json -> metric."""


@dataclass(frozen=True)
class Row:
    """One number of every arm, and the paired adapter - base difference when there are two arms."""

    key: str
    label: str
    subject: str
    unit: str
    higher_is_better: bool
    arms: dict[str, Estimate]
    difference: Estimate | None

    @property
    def verdict(self) -> Verdict | None:
        """Whether the difference is clear of 0, and in which direction; None with one arm."""
        if self.difference is None:
            return None
        if self.difference.n < FEWEST_UNITS:
            return "too few"
        if self.difference.low <= 0 <= self.difference.high:
            return "unclear"
        return "better" if (self.difference.mean > 0) == self.higher_is_better else "worse"

    @property
    def direction(self) -> str:
        """An arrow towards better."""
        return "↑" if self.higher_is_better else "↓"


@dataclass(frozen=True)
class Section:
    """Rows that belong in one table, and what their metrics mean."""

    title: str
    rows: list[Row]
    meanings: dict[str, str]
    is_coarse: bool = False
    """Shares of a few questions: every arm's own interval is then worth showing beside its value."""

    @property
    def units(self) -> str:
        """What every number is a mean over."""
        return f"{self.rows[0].arms['base'].n} {self.rows[0].unit}"


def sections(result: Result) -> list[Section]:
    """Every number of the result, in the order of reading: text probes, then needle tasks."""
    found = [text_section(result)]
    if result["records"]["base"]["needles"]:
        found += [needle_section(result, suffix) for suffix in NEEDLES]
    return found


def text_section(result: Result) -> Section:
    """The text probes, metric by metric, budget by budget."""
    rows = []
    for name, metric in TEXT.items():
        has_budget = "{k}" in metric.label
        for k in result["settings"]["budgets"] if has_budget else [None]:
            key = f"{name}@{k}" if has_budget else name
            rows.append(make_row(result, key, metric, metric.label.format(k=k), "windows", k=k))
    meanings = {metric.label.format(k="k"): metric.meaning for metric in TEXT.values()}
    return Section("Held-out text", rows, meanings)


def needle_section(result: Result, suffix: str) -> Section:
    """One measure of the needle tasks: every task with every kind of attention."""
    metric = NEEDLES[suffix]
    rows = []
    for task, arms in result["records"]["base"]["needles"].items():
        for attention in arms:
            shown = attention_name(attention, result["settings"])
            key, label = f"{task}_{attention}{suffix}", f"{task}, {shown}"
            if key in result["arms"]["base"]:
                rows.append(make_row(result, key, metric, label, "questions", task=task, attention=shown))
    return Section(f"Needles: {metric.label}", rows, {metric.label: metric.meaning}, is_coarse=suffix == "")


def attention_name(attention: str, settings: dict[str, Any]) -> str:
    """A selection rule with its budget."""
    return attention if attention == "exact" else f"{attention} k={settings['needle_budget']}"


def make_row(result: Result, key: str, metric: Metric, label: str, unit: str, **names: Any) -> Row:
    """Look a metric up in every arm; `names` fill in the metric's subject."""
    arms = {arm: Estimate(**estimates[key]) for arm, estimates in result["arms"].items()}
    difference = Estimate(**result["paired"][key]) if result["paired"] else None
    return Row(key, label, metric.subject.format(**names), unit, metric.higher_is_better, arms, difference)


# --- words ---


def number(value: float) -> str:
    """Three decimals, no -0.000."""
    return f"{value:z.3f}"


def signed(value: float) -> str:
    """Three decimals, always with a sign."""
    return f"{value:+z.3f}"


def interval(estimate: Estimate, form: Any = number) -> str:
    """The two ends of the 95 % interval."""
    return f"{form(estimate.low)} to {form(estimate.high)}"


def sentence(row: Row) -> str:
    """What became of one number, in plain words."""
    base, change = row.arms["base"], row.difference
    if change is None:
        return f"{row.subject} is {number(base.mean)} (95 % interval {interval(base)}, {base.n} {row.unit})."
    went = f"from {number(base.mean)} to {number(row.arms['adapter'].mean)}"
    facts = f"{signed(change.mean)}, 95 % interval {interval(change, signed)}, {change.n} {row.unit}"
    if row.verdict == "too few":
        return f"{row.subject} went {went} ({facts}: too few to tell)."
    if row.verdict == "unclear":
        return f"{row.subject} shows no clear change: {went} ({facts})."
    return f"{row.subject} {'rose' if change.mean > 0 else 'fell'} {went} ({facts})."


def headline(result: Result) -> str:
    """The one sentence to remember: recall at the largest budget."""
    return sentence(rows_by_key(result)[f"recall@{max(result['settings']['budgets'])}"])


def summary(result: Result) -> list[tuple[Verdict | None, str]]:
    """(verdict, sentence) of what matters beside the headline: cost of sparsity, cost of tuning, sparse needles."""
    wanted = [f"ce_gap@{max(result['settings']['budgets'])}", "ce_exact"]
    for task, arms in result["records"]["base"]["needles"].items():
        for attention in arms:
            if attention != "exact":
                wanted += [f"{task}_{attention}", f"{task}_{attention}_forwards"]
    rows = rows_by_key(result)
    return [(rows[key].verdict, sentence(rows[key])) for key in wanted]


def rows_by_key(result: Result) -> dict[str, Row]:
    """Every row by its key in results.json."""
    return {row.key: row for section in sections(result) for row in section.rows}


# --- terminal ---

MARKS: dict[Verdict, Text] = {
    "better": Text("✔ better", "bold green"),
    "worse": Text("✘ worse", "bold red"),
    "unclear": Text("~", "dim"),
    "too few": Text("too few", "dim"),
}


def print_tables(result: Result) -> None:
    """Print every number as tables that fit 80 columns, and in closing words what to remember.

    Recall is never shown off alone: a tuned model's gap and exact cross-entropy stand beside it.
    """
    console = Console(highlight=False)
    for section in sections(result):
        console.print(table(section))
    if result["paired"]:
        console.print(
            "↑ higher is better, ↓ lower is better. ✔ ✘: the 95 % interval of the paired change excludes 0.",
            style="dim",
        )
    console.print(headline(result), style="bold")
    if result["paired"]:
        for _, words in summary(result)[:2]:
            console.print(words)


def table(section: Section) -> Table:
    """One section as a rich table."""
    shown = Table(
        title=f"{section.title} ({section.units})",
        box=box.SIMPLE,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    has_two_arms = section.rows[0].difference is not None
    titles = [*section.rows[0].arms, *(["change"] if has_two_arms else []), "95 % interval"]
    shown.add_column("metric")
    for title in titles:
        shown.add_column(title, justify="right", no_wrap=True)
    if has_two_arms:
        shown.add_column("", no_wrap=True)
    for row in section.rows:
        label = f"{row.label} {row.direction}"
        if row.difference is None or row.verdict is None:
            shown.add_row(label, number(row.arms["base"].mean), interval(row.arms["base"]))
            continue
        values = [value_cell(estimate, with_interval=section.is_coarse) for estimate in row.arms.values()]
        change = row.difference
        shown.add_row(label, *values, signed(change.mean), interval(change, signed), MARKS[row.verdict])
    return shown


def value_cell(estimate: Estimate, *, with_interval: bool) -> Text:
    """A mean, with its interval on a second line where that is wanted."""
    cell = Text(number(estimate.mean))
    if with_interval:
        cell.append(f"\n{estimate.low:.2f}-{estimate.high:.2f}", "dim")
    return cell


# --- files ---


def write_report(result: Result, out: Path) -> None:
    """Write plots and report.html into `out`.

    Args:
        result: what `mage_tune.evals.run.summarise` made, or results.json read back.
        out: existing folder; the training curves come from metrics.jsonl beside it, if there is one.
    """
    plots = draw_plots(result, training_log(out.parent / "metrics.jsonl"))
    for plot in plots:
        (out / f"{plot.name}.png").write_bytes(plot.light)
        (out / f"{plot.name}-dark.png").write_bytes(plot.dark)
    (out / "report.html").write_text(html(result, plots), encoding="utf-8")


def training_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none when there is no such file."""
    if not path.is_file():
        return []
    whole = path.read_text().rpartition("\n")[0]  # a killed run may leave its last line unfinished
    return [json.loads(line) for line in whole.splitlines()]


def html(result: Result, plots: list[Plot]) -> str:
    """The report as one page that needs nothing else."""
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    return page.render(
        title=title(result),
        headline=headline(result),
        summary=summary(result),
        sections=sections(result),
        has_two_arms=bool(result["paired"]),
        number=number,
        signed=signed,
        interval=interval,
        plots=plots,
        embed=lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
        samples=list(samples(result)),
        asked=TASKS,
        settings=result["settings"],
        environment=result["environment"],
        fewest=FEWEST_UNITS,
    )


def title(result: Result) -> str:
    """What was evaluated, by its folder's or repository's name."""
    settings = result["settings"]
    model, adapter = (Path(settings[key]).name if settings.get(key) else None for key in ("model", "adapter"))
    return f"{adapter} on {model}" if adapter else model or "evaluation"


@dataclass(frozen=True)
class Sample:
    """One needle question with the answer of every arm."""

    task: str
    attention: str
    number: int
    expected: list[str]
    answers: dict[str, dict[str, Any]]


def samples(result: Result) -> Iterator[Sample]:
    """Answers under sparse attention: questions where the arms differ first, otherwise in the order asked."""
    records = {arm: found["needles"] for arm, found in result["records"].items()}
    for task, arms in records["base"].items():
        for attention in arms:
            if attention == "exact":
                continue
            asked = list(zip(*(records[arm][task][attention] for arm in records), strict=True))
            order = sorted(range(len(asked)), key=lambda i: len({answer["is_right"] for answer in asked[i]}) == 1)
            for i in order[:SAMPLES]:
                answers = dict(zip(records, asked[i], strict=True))
                shown = attention_name(attention, result["settings"])
                yield Sample(task, shown, i + 1, list(asked[i][0]["expected"]), answers)
