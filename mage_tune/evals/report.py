"""What an evaluation found, for people: tables on the terminal, PNG plots, and one self-contained report.html.

Everything here reads the dictionary that `mage_tune.evals.results.summarise` makes (eval/results.json) and measures
nothing itself. What a number is called, which way is better and what it means is in the result, from its task.
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

from mage_tune.evals.plots import Plot, draw_plots
from mage_tune.evals.stats import Estimate, Paired

Result = dict[str, Any]
Verdict = Literal["better", "worse", "unclear", "too few"]

FEWEST_UNITS = 6
"""Below this a difference is never called clear: five windows that agree are still chance one time in sixteen."""
HARDLY_SPARSE = 0.1
"""Share of sparse steps below which a sparse arm compares next to nothing."""
MOST_WORDS = 12
"""Sentences of a summary; a longer one tells what stands out."""
SAMPLES = 6
"""Sample answers shown per needle task."""


SUBJECTS = {
    "recall": "Recall@{k}",
    "mass": "The attention mass kept at k = {k}",
    "query_cosine": "The query cosine",
    "ce_exact": "Cross-entropy with exact attention",
    "ce_mask": "Cross-entropy with keys chosen at the all-[MASK] step (k = {k})",
    "ce_oracle": "Cross-entropy with keys chosen at the same step (k = {k})",
    "ce_gap": "The CE gap at k = {k} (mask-k less exact, in nats)",
}
"""Text probes, in the order they are shown: metric up to its "@k" -> how a sentence calls it."""

NEEDLES = {
    "right": "The share of {task}-needle questions answered right ({shown})",
    "found": "The share of values found in {task}-needle questions ({shown})",
    "forwards": "The number of forwards per block in {task}-needle questions ({shown})",
}
"""Needle tasks: metric -> how a sentence calls it."""

OTHERS = {
    "rules": {
        "ce": "Cross-entropy of held-out text under {shown}",
        "recall": "Recall of held-out text under {shown}",
    },
    "layers": {
        "foresight_cost": "What it costs to choose keys at the all-[MASK] step rather than at each step (in nats)",
        "sum_of_layers": "What single layers win by choosing at each step, summed (in nats)",
    },
    "continuation": {
        "copied": "The share of a passage's tokens copied in their places ({shown})",
        "forwards": "The number of forwards per block in {task} ({shown})",
    },
}
"""Other tasks of our own: kind -> metric -> how a sentence calls it."""

GROUPS = {
    "text": "Held-out text",
    "rules": "Held-out text, rule by rule",
    "layers": "Layers",
    "needles": "Needles",
    "continuation": "Copying and going on",
    "ruler": "RULER",
    "longbench": "LongBench",
    "lm_eval": "Benchmarks",
}
"""Kind of task -> heading."""


@dataclass(frozen=True)
class Row:
    """One number of every side, and the paired adapter - base difference when there are two."""

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

    @property
    def interval(self) -> str:
        """Ends of the difference's interval."""
        return "" if self.difference is None else interval(self.difference, signed)

    @property
    def score(self) -> str:
        """ "5 / 2 / 1": units on which the second side won, tied and lost."""
        found = self.difference
        return f"{found.wins} / {found.ties} / {found.losses}" if isinstance(found, Paired) else ""


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
        counts = sorted({row.arms[next(iter(row.arms))].n for row in self.rows})
        shown = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        return f"{shown} {self.rows[0].unit}"


def sections(result: Result) -> list[Section]:
    """Every number of the result, in the order of reading: text probes, then one table for each measure of a kind.

    Raises:
        ValueError: the result was written by an older version.
    """
    if "metrics" not in result:
        raise ValueError("these results were written by an older mage_tune; run mage-tune eval again")
    groups: dict[tuple[str, str], list[str]] = {}
    for key, info in result["metrics"].items():
        is_probe = info["kind"] == "text"
        # Costs after all scores of a kind; probes of one task share a table.
        title = task_title(result, info["task"]) if is_probe else f"{group_title(info)}: {info['label']}"
        groups.setdefault((info["kind"], title), []).append(key)
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    ordered = sorted(groups, key=lambda group: (kinds.index(group[0]), is_cost(result, groups[group])))
    return [make_section(result, kind, title, groups[kind, title]) for kind, title in ordered]


def is_cost(result: Result, keys: list[str]) -> bool:
    """Whether a table is about speed."""
    return bool(result["metrics"][keys[0]]["is_cost"])


def group_title(info: dict[str, Any]) -> str:
    """Heading of a kind of task."""
    return GROUPS.get(info["kind"], info["kind"])


def task_title(result: Result, task: str) -> str:
    """Heading of a task, with its name where it is not the only one of its kind."""
    facts = result["tasks"][task]
    alone = sum(other["kind"] == facts["kind"] for other in result["tasks"].values()) == 1
    return str(facts["title"]) if alone else f"{facts['title']} ({task})"


def make_section(result: Result, kind: str, title: str, keys: list[str]) -> Section:
    """One table."""
    if kind == "text":
        names = list(SUBJECTS)
        keys = sorted(keys, key=lambda key: names.index(result["metrics"][key]["metric"].partition("@")[0]))
    meanings, rows = {}, []
    for key in keys:
        info = result["metrics"][key]
        rows.append(make_row(result, key))
        budget = info["metric"].partition("@")[2]
        meanings[info["label"].replace(budget, "k") if budget else info["label"]] = info["meaning"]
    coarse = all(isinstance(value, bool) for value in next(iter(result["values"].values()))[keys[0]])
    return Section(title, rows, {label: meaning for label, meaning in meanings.items() if meaning}, is_coarse=coarse)


def make_row(result: Result, key: str) -> Row:
    """One number with everything around it."""
    info = result["metrics"][key]
    arms = {side: Estimate(**found[key]) for side, found in result["arms"].items()}
    change = Paired(**result["paired"][key]) if result["paired"] else None
    label = info["label"] if info["kind"] in ("text", "layers") else row_label(result, info)
    return Row(key, label, subject(info), info["unit"], info["higher_is_better"], arms, change)


def row_label(result: Result, info: dict[str, Any]) -> str:
    """ "multi, mage k=32"; the reading alone where a kind has one task."""
    others = {other["task"] for other in result["metrics"].values() if other["kind"] == info["kind"]}
    return str(info["shown"]) if len(others) == 1 else f"{short_name(info)}, {info['shown']}"


def short_name(info: dict[str, Any]) -> str:
    """A task's name without its kind in front."""
    return str(info["task"]).removeprefix(f"{info['kind']}_")


def subject(info: dict[str, Any]) -> str:
    """How a sentence calls a number."""
    name, _, budget = info["metric"].partition("@")
    if info["kind"] == "text" and name in SUBJECTS:
        return SUBJECTS[name].format(k=budget)
    if info["kind"] == "needles" and name in NEEDLES:
        return NEEDLES[name].format(task=short_name(info), shown=info["shown"])
    if info["kind"] in OTHERS and name in OTHERS[info["kind"]]:
        return OTHERS[info["kind"]][name].format(task=info["task"], shown=info["shown"])
    return f"{group_title(info)}, {short_name(info)}: {info['label']} ({info['shown']})"


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
    """The one sentence to remember: recall at the largest budget, or else the first task's own headline."""
    if "metrics" not in result:
        raise ValueError("these results were written by an older mage_tune; run mage-tune eval again")
    keys = [key for key, info in result["metrics"].items() if info["is_headline"]]
    return sentence(make_row(result, (keys or list(result["metrics"]))[0]))


def summary(result: Result) -> list[tuple[Verdict | None, str]]:
    """(verdict, sentence) of what matters beside the headline: cost of sparsity, cost of tuning, sparse tasks."""
    wanted = []
    for task, facts in result["tasks"].items():
        mine = {key: info for key, info in result["metrics"].items() if info["task"] == task}
        if facts["kind"] == "text":
            gaps = [key for key, info in mine.items() if info["metric"].startswith("ce_gap@")]
            wanted += [gaps[-1], *(key for key, info in mine.items() if info["metric"] == "ce_exact")]
            continue
        shown = spoken_reading(mine)
        wanted += [
            key
            for key, info in mine.items()
            if info["reading"] == shown and (info["is_headline"] or info["is_cost"]) and key != headline_key(result)
        ]
    rows = [make_row(result, key) for key in wanted]
    told = [(row.verdict, sentence(row)) for row in rows]
    if len(told) > MOST_WORDS:  # a long suite: what stands out, and how much does not
        out = [(verdict, words) for verdict, words in told[2:] if verdict in ("better", "worse")][:MOST_WORDS]
        rest = f"{len(told) - 2 - len(out)} more numbers under sparse attention are in the tables below."
        told = [*told[:2], *out, (None, rest)]
    return told + [(None, words) for words in hardly_sparse(result)]


def hardly_sparse(result: Result) -> Iterator[str]:
    """Warnings about sparse arms that were exact nearly all the time: their equal scores say nothing."""
    for task, facts in result["tasks"].items():
        shares = {r: share for r, share in facts["sparse_share"].items() if r != "exact" and share < HARDLY_SPARSE}
        if shares:
            told = ", ".join(f"{100 * share:.0f} % under {reading}" for reading, share in shares.items())
            yield (
                f"Hardly any step of {task} was sparse ({told}): blocks were finished at once, so exact and sparse "
                "attention are not told apart there."
            )


def headline_key(result: Result) -> str | None:
    """Key of the number that the headline is about."""
    return next((key for key, info in result["metrics"].items() if info["is_headline"]), None)


def spoken_reading(metrics: dict[str, dict[str, Any]]) -> str:
    """Of a task's arms the one that words are about: MAGE's at its smallest budget, else the last."""
    readings = list(dict.fromkeys(info["reading"] for info in metrics.values()))
    return next((reading for reading in readings if reading.split()[0] == "mage"), readings[-1])


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
    for name, why in result["skipped"].items():
        console.print(f"{name} was skipped: {why}", style="yellow")
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


def plain_table(titles: list[str], rows: list[list[Any]]) -> Table:
    """Rows as they are: the first column to the left, all others to the right."""
    shown = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for i, title in enumerate(titles):
        shown.add_column(title, justify="right" if 0 < i < len(titles) - 1 else "left", no_wrap=i > 0, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def value_cell(estimate: Estimate, *, with_interval: bool) -> Text:
    """A mean, with its interval on a second line where that is wanted."""
    cell = Text(number(estimate.mean))
    if with_interval:
        cell.append(f"\n{estimate.low:.2f}-{estimate.high:.2f}", "dim")
    return cell


# --- files ---


def write_report(result: Result, out: Path, log: Path | None = None) -> None:
    """Write plots and report.html into `out`.

    Args:
        result: what `mage_tune.evals.results.summarise` made, or results.json read back.
        out: existing folder.
        log: metrics.jsonl of the run, for the training curves.
    """
    plots = draw_plots(result, training_log(log) if log is not None else [])
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
        costs=list(sparse_costs(result)),
        times=times(result),
        tasks=result["tasks"],
        skipped=result["skipped"],
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
class Cost:
    """What a sparse arm changes against exact attention, on one side."""

    side: str
    label: str
    direction: str
    exact: float
    sparse: float
    change: Paired


def sparse_costs(result: Result) -> Iterator[Cost]:
    """Every score (costs apart) of every sparse arm against the exact arm of the same side."""
    exact = {(i["task"], i["metric"]): key for key, i in result["metrics"].items() if i["reading"] == "exact"}
    for key, info in result["metrics"].items():
        if info["is_cost"] or not (info["is_headline"] or info["metric"] in ("found", "right", "ce")):
            continue
        for side, found in result["against_exact"].items():
            if key in found:
                arms = result["arms"][side]
                yield Cost(
                    side,
                    f"{info['task']}: {info['label']}, {info['shown']}",
                    "↑" if info["higher_is_better"] else "↓",
                    arms[exact[info["task"], info["metric"]]]["mean"],
                    arms[key]["mean"],
                    Paired(**found[key]),
                )


def times(result: Result) -> list[tuple[str, str, dict[str, float]]]:
    """(task, reading, seconds per sample of every side), in order."""
    seconds = result["timings"]["seconds_per_sample"]
    rows = []
    for task, facts in result["tasks"].items():
        for reading in facts["arms"]:
            names = {side: f"{side} | {task} | {reading}" for side in result["arms"]}
            found = {side: seconds[name] for side, name in names.items() if name in seconds}
            if found:
                rows.append((task, reading, found))
    return rows


@dataclass(frozen=True)
class Sample:
    """One question with the answer of every side."""

    task: str
    attention: str
    number: int
    expected: list[str]
    answers: dict[str, dict[str, Any]]


def samples(result: Result) -> Iterator[Sample]:
    """Answers under sparse attention: questions where the sides differ first, otherwise in the order asked."""
    records = result["records"]
    sides = list(records)
    many = 1 if len(result["tasks"]) > 6 else 3 if result["suite"] else SAMPLES
    for task, readings in records[sides[0]].items():
        written = [reading for reading, found in readings.items() if found and any(one["output"] for one in found)]
        if not written:
            continue
        infos = {key: info for key, info in result["metrics"].items() if info["task"] == task}
        reading = spoken_reading({key: info for key, info in infos.items() if info["reading"] in written})
        asked = list(zip(*(records[side][task][reading] for side in sides), strict=True))
        order = sorted(range(len(asked)), key=lambda i: len({outcome(one) for one in asked[i]}) == 1)
        shown = next(info["shown"] for info in infos.values() if info["reading"] == reading)
        for i in order[:many]:
            answers = {
                side: {"text": one["output"], "is_right": one["facts"].get("is_right")}
                for side, one in zip(sides, asked[i], strict=True)
            }
            expected = [str(value) for value in asked[i][0]["facts"].get("expected", [])]
            yield Sample(task, shown, i + 1, expected, answers)


def outcome(record: dict[str, Any]) -> Any:
    """Whether an answer was right; its text where that is not said."""
    return record["facts"].get("is_right", record["output"])
