"""Measure every selection rule on the same windows and questions, and write results/selection_rules.json.

    python scripts/compare_rules.py models/smollm2-135m-diffusion data/debian-docs/heldout.u16.npy \\
        results/selection_rules.json --seconds 240
    python scripts/compare_rules.py --table results/selection_rules.json     # the Markdown tables of the docs
    python scripts/compare_rules.py --table results/selection_rules.json --plot docs/images/selection.png

Text probes are those of `mage-tune eval` (windows, blocks, reveals and seeds of evals/probes.py): cross-entropy of the
still masked tokens of partly revealed blocks, exact and under each rule, and recall, the share of the keys that this
very step would choose by mean probability that the rule lets it see. A rule that chooses at a step s > 0 (sparsed,
sparse-dllm, a re-selection) does so on the block with its first s tokens revealed, one a step, as with a block's worth
of steps; a refresh chooses on the argmax draft of the all-[MASK] step; quest, tidal and oracle choose at the very step.

Four tasks are decoded: multi-needle questions until every token is sure (threshold 0.9), the same questions in a fixed
number of steps (a model that is sure at once never reaches a sparse step: the first task alone would compare nothing),
a passage of the window that begins again and is to be copied on, in as many steps, and the next block of held-out
windows, for its forwards per block.

A window or a question is a unit, and every rule gets every unit before the next one is begun, so that stopping when the
time is up favours none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mage_tune import load
from mage_tune.data.text import load_ids
from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.result import RowResult
from mage_tune.decode.rules import Rule, make_rule
from mage_tune.decode.sampler import AcceptanceName
from mage_tune.decode.steps import Levers
from mage_tune.environment import environment
from mage_tune.evals.continuation import CopyPrompt, copy_prompt
from mage_tune.evals.needles import TASKS, NeedlePrompt, needle_prompts
from mage_tune.evals.probes import REVEALS
from mage_tune.evals.run import SEED, check_settings, cut_windows, progress, shown
from mage_tune.evals.stats import estimate, paired_difference
from mage_tune.evals.store import write_whole
from mage_tune.evals.windows import Probed, Window, choose, look_everywhere, probe_arm
from mage_tune.evals.windows import open_window as open_seeded
from mage_tune.lm import BlockDiffusionLM
from mage_tune.recipe import Eval, override_section

T = TypeVar("T")
Key = tuple[str, int | None]
"""(label of an arm, budget): one row of the result; exact has no budget."""

STEPS = 8
"""Steps per block of the questions that are answered in a fixed number of them."""
KEEP_EVERY = 30.0
"""Seconds between two writings of a result under way, which costs a second or two."""


@dataclass(frozen=True)
class Arm:
    """A rule and the levers on top of it."""

    label: str
    rule: str
    levers: Levers = field(default_factory=Levers)
    options: tuple[tuple[str, Any], ...] = ()
    """Of the rule, beside its budget and dense layers."""

    def at(self, budget: int, dense_layers: int) -> Rule:
        """The rule with a budget of keys per KV head; equal for all rules, those with a ratio of their own too."""
        return make_rule(self.rule, **{"budget": budget, "dense_layers": dense_layers} | dict(self.options))


EXACT = Arm("exact", "exact")
MAGE = Arm("mage", "mage")
SPARSE = (
    MAGE,
    Arm("mage, draft refresh", "mage", Levers(refresh="draft")),
    Arm("mage, union refresh", "mage", Levers(refresh="union")),
    Arm("mage, residual", "mage", Levers(residual=True)),
    Arm("mage, re-selected at step 2", "mage", Levers(reselect_at=(2,))),
    Arm("mage-v1", "mage-v1"),
    Arm("mean-query", "mean-query"),
    Arm("quest", "quest"),
    Arm("sparsed, equal budget", "sparsed"),
    Arm("tidal", "tidal"),
    Arm("sparse-dllm, equal budget", "sparse-dllm"),
    Arm("oracle", "oracle"),
)
DEFINITIONS = {
    "recall": "share of the keys that this step's own exact attention ranks highest (mean probability over block and "
    "group, top k per KV head) that the rule lets the step see; mean over layers from dense_layers on, KV heads, "
    "reveals and blocks; a layer that sees everything (tidal's sources) counts 1",
    "ce": "cross-entropy of the still masked tokens, nats; mean over reveals and blocks of a window",
    "ce_gap": "ce under the rule minus ce with exact attention, paired by window",
    "needles": "share of questions whose answer holds all values asked for, decoded at the threshold",
    "found": "share of the values asked for that the answer holds",
    "forwards_per_block": "exact and sparse denoising forwards per block; a refresh counts as one",
    "sparse_steps": "share of those forwards that were sparse; sparsed is dense for the first 20 % of a block's steps "
    "(of 32 at a threshold), so where blocks finish sooner it answers exactly",
    "copy_found": f"share of the tokens of a passage seen before that are copied on in their places, in {STEPS} steps",
    "stepped_*": f"the same questions in {STEPS} steps per block, the surest tokens first, whatever their confidence",
    "text_*": "the next block of held-out text, decoded at the threshold",
    "choosing step": "in the probes a rule that chooses at step s does so with s tokens of the block revealed",
    "intervals": "95 %: bootstrap over units; Wilson for shares of questions, Bonett-Price for their differences",
}


# Text probes


def open_window(lm: BlockDiffusionLM, tokens: np.ndarray, number: int, blocks: int) -> Window:
    """A window of the text probes, revealed as `mage-tune eval` does."""
    return open_seeded(lm, tokens, number, blocks, SEED)


@torch.no_grad()
def probe_window(
    lm: BlockDiffusionLM, tokens: np.ndarray, number: int, settings: Eval, arms: Sequence[Arm] = SPARSE
) -> dict[Key, Probed]:
    """Every arm at every budget on one window; `arms` include mage and oracle."""
    window = open_window(lm, tokens, number, settings.blocks)
    rules = {arm: [arm.at(budget, settings.dense_layers) for budget in settings.budgets] for arm in arms}
    looks = look_everywhere(window, rules)
    (oracle,) = (arm for arm in arms if arm.rule == "oracle")
    own = [choose(window, oracle, rule, looks).selection for rule in rules[oracle]]
    found: dict[Key, Probed] = {(EXACT.label, None): Probed(window.losses(looks["later"].hidden)[0], None)}
    for arm in arms:
        probed = probe_arm(window, arm, rules[arm], looks, own)
        found |= {(arm.label, k): one for k, one in zip(settings.budgets, probed, strict=True)}
    return found


# Decoding


Prompt = NeedlePrompt | CopyPrompt


@dataclass(frozen=True)
class Task:
    """Prompts and how they are continued. What its `name` begins with, its metrics do too."""

    name: str
    prompts: Sequence[Prompt]
    """Needle prompts that expect nothing: only the forwards count."""
    acceptance: AcceptanceName
    max_new_tokens: int
    threshold: float
    steps: int | None = None
    stops: bool = False
    """Whether a stop token ends the text."""


@dataclass(frozen=True)
class Answered:
    """One row of the result on one prompt."""

    is_right: bool
    found: float
    forwards_per_block: float
    sparse_steps: float


def tasks_of(lm: BlockDiffusionLM, tokens: np.ndarray, settings: Eval, continuations: int) -> list[Task]:
    """The multi-needle questions of `mage-tune eval`, twice; passages to copy; windows less their last block."""
    size, tasks = lm.family.block_size, []
    steps = min(STEPS, size)
    if settings.needles:
        asked = TASKS["multi"]
        needles = needle_prompts(
            lm,
            tokens,
            context=settings.context,
            needles=settings.needles,
            asked=asked,
            questions=settings.questions,
            seed=SEED,
        )
        longest = size * (1 + asked)
        tasks = [
            Task("", needles, "threshold", longest, settings.threshold, stops=True),
            Task("stepped_", needles, "static", longest, settings.threshold, steps, stops=True),
        ]
    if continuations:
        windows = cut_windows(tokens, settings.context, settings.documents)
        chosen = window_order(len(windows))[:continuations]
        copies = [copy_prompt(windows[number], size, np.random.default_rng([SEED, number])) for number in chosen]
        tasks.append(Task("copy_", copies, "static", size, settings.threshold, steps))
        plain = [NeedlePrompt(windows[number][:-size].astype(np.int64), ()) for number in chosen]
        tasks.append(Task("text_", plain, "threshold", size, settings.threshold))
    return tasks


def window_order(count: int) -> list[int]:
    """The order in which windows are taken: random but fixed, so that those done are spread over the text."""
    return np.random.default_rng(SEED).permutation(count).tolist()


def decode(
    lm: BlockDiffusionLM, task: Task, prompts: Sequence[Prompt], rule: Rule, levers: Levers, cache: PrefixCache
) -> list[RowResult]:
    """Continue a batch of prompts greedily, from what `cache` holds of them."""
    return lm.generate(
        [prompt.input_ids.tolist() for prompt in prompts],
        max_new_tokens=task.max_new_tokens,
        attention=rule,
        acceptance=task.acceptance,
        threshold=task.threshold,
        steps=task.steps,
        stop_ids=None if task.stops else (),
        cache=cache,
        **levers.settings(),
    ).rows


def score(prompt: Prompt, row: RowResult) -> Answered:
    """What counts of a continuation: the values asked for that are in it, or the tokens copied in their places."""
    if isinstance(prompt, CopyPrompt):
        found = [written == token for written, token in zip(row.tokens, prompt.continuation.tolist(), strict=False)]
    else:
        found = [value in (row.text or "") for value in prompt.expected]
    steps = row.forwards["exact"] + row.forwards["sparse"]
    return Answered(
        is_right=all(found),
        found=sum(found) / max(1, len(found)),
        forwards_per_block=steps / max(1, row.blocks),
        sparse_steps=row.forwards["sparse"] / max(1, steps),
    )


def answer_all(
    lm: BlockDiffusionLM,
    tasks: Sequence[Task],
    units: range,
    settings: Eval,
    cache: PrefixCache,
    arms: Sequence[Arm] = SPARSE,
) -> dict[str, dict[Key, list[Answered]]]:
    """Some prompts, the same in all `tasks`, by exact attention and by every arm at every budget.

    The prompts are read once, into `cache` with a row for each; every task and rule starts from there.
    """
    keyed: list[tuple[Key, Rule, Levers]] = [((EXACT.label, None), make_rule(EXACT.rule), EXACT.levers)]
    for arm in arms:
        keyed += [((arm.label, k), arm.at(k, settings.dense_layers), arm.levers) for k in settings.budgets]
    found: dict[str, dict[Key, list[Answered]]] = {}
    for task in tasks:
        prompts = [task.prompts[i] for i in units]
        found[task.name] = {
            key: [score(*pair) for pair in zip(prompts, decode(lm, task, prompts, rule, levers, cache), strict=True)]
            for key, rule, levers in keyed
        }
    return found


# Everything


class Clock:
    """Shares out the time between parts, in order; what one leaves goes to those after it."""

    def __init__(self, seconds: float, shares: Sequence[float]) -> None:
        self.start = time.perf_counter()
        ends = np.cumsum(shares) / sum(shares) * seconds
        self.ends = [self.start + float(end) for end in ends]
        self.took: dict[str, float] = {}

    def within(self, part: str, units: Sequence[T]) -> Iterator[T]:
        """The units that there is time for: the first, and then as long as one more like the last would fit."""
        begin, end, last = time.perf_counter(), self.ends[len(self.took)], 0.0
        for unit in units:
            start = time.perf_counter()
            if last and start + last > end:
                break
            yield unit
            last = time.perf_counter() - start
        self.took[part] = round(time.perf_counter() - begin, 1)


@dataclass(frozen=True)
class Measured:
    """All units done, by row of the result."""

    probes: dict[Key, list[Probed]]
    answers: dict[str, dict[Key, list[Answered]]]
    """By task."""
    windows: list[int]
    """Numbers of the windows, in the order probed."""
    seconds: dict[str, float]
    """What each part took."""

    def done(self, task: str) -> int:
        """Prompts of a task that every rule has continued."""
        return len(self.answers[task][EXACT.label, None]) if task in self.answers else 0


def measure(
    lm: BlockDiffusionLM,
    tokens: np.ndarray,
    settings: Eval,
    *,
    seconds: float,
    batch: int,
    continuations: int,
    arms: Sequence[Arm] = SPARSE,
    keep: Callable[[Measured], None] = lambda _: None,
) -> Measured:
    """Probe windows, ask questions and continue text until all is done or the time is up; parts leave time to later.

    `keep` gets what there is after every unit, so that a run that is cut short loses one unit at most.
    """
    windows = cut_windows(tokens, settings.context, settings.documents)
    tasks = tasks_of(lm, tokens, settings, continuations)
    parts = {task.name: [task] for task in tasks if task.name not in ("", "stepped_")}
    if settings.needles:
        parts = {"questions": tasks[:2]} | parts  # the same prompts, read once
    batches = {
        name: [range(i, min(i + batch, len(part[0].prompts))) for i in range(0, len(part[0].prompts), batch)]
        for name, part in parts.items()
    }
    probes: dict[Key, list[Probed]] = defaultdict(list)
    answers: dict[str, dict[Key, list[Answered]]] = {task.name: defaultdict(list) for task in tasks}
    done: list[int] = []
    clock = Clock(seconds, [1.0] * (1 + len(parts)))
    measured = Measured(probes, answers, done, clock.took)
    with progress(len(windows) + sum(map(len, batches.values()))) as advance:
        for number in clock.within("probes", window_order(len(windows))):
            for key, probed in probe_window(lm, windows[number], number, settings, arms).items():
                probes[key].append(probed)
            done.append(number)
            keep(measured)
            advance()
        for name, part in parts.items():
            for units in clock.within(name, batches[name]):
                cache = PrefixCache.for_model(lm.model, len(units), 0)  # grows as needed
                for task, found in answer_all(lm, part, units, settings, cache, arms).items():
                    for key, answered in found.items():
                        answers[task][key] += answered
                keep(measured)
                advance()
    return measured


def unit_values(measured: Measured, key: Key) -> dict[str, np.ndarray]:
    """Metric name -> value of every unit, for one row of the result."""
    probes, values = measured.probes[key], {}
    values["ce"] = np.array([p.ce for p in probes])
    if all(p.recall is not None for p in probes):
        values["recall"] = np.array([p.recall for p in probes], dtype=np.float64)
    for task, answers in measured.answers.items():
        if not answers[key]:  # a run that was cut short
            continue
        if task != "text_":
            values[f"{task}needles"] = np.array([a.is_right for a in answers[key]])
            values[f"{task}found"] = np.array([a.found for a in answers[key]])
        for name in ("forwards_per_block", "sparse_steps"):
            values[task + name] = np.array([getattr(a, name) for a in answers[key]])
    return values


def summarise(measured: Measured, settings: Eval, arms: Sequence[Arm] = SPARSE) -> list[dict[str, Any]]:
    """The rows of the result: estimates, and paired differences from exact attention and from mage at the budget."""
    exact = unit_values(measured, (EXACT.label, None))
    rows = [_row(EXACT, None, {"rule": "exact"}, exact) | {"recall": None, "recall_note": "sees every key"}]
    for budget in settings.budgets:
        mage = unit_values(measured, (MAGE.label, budget))
        for arm in arms:
            values = unit_values(measured, (arm.label, budget))
            options = arm.at(budget, settings.dense_layers).settings() | arm.levers.settings()
            row = _row(arm, budget, options, values)
            row["ce_gap"] = asdict(paired_difference(values["ce"], exact["ce"]))
            row["against_exact"] = _differences(values, exact)
            if arm is not MAGE:
                row["against_mage"] = _differences(values, mage)
            rows.append(row)
    return rows


def _row(arm: Arm, budget: int | None, options: dict[str, Any], values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    named = {"label": arm.label, "rule": arm.rule, "options": options, "budget": budget}
    return named | {name: asdict(estimate(value)) for name, value in values.items()}


def _differences(values: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: asdict(paired_difference(value, other[name])) for name, value in values.items() if name in other}


def markdown(result: Mapping[str, Any]) -> str:
    """One table per budget: every rule, with 95 % intervals."""
    parts = []
    exact = result["rows"][0]
    for budget in result["settings"]["budgets"]:
        rows = [exact, *(row for row in result["rows"] if row["budget"] == budget)]
        lines = [f"k = {budget}", "", f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


COLUMNS = (
    "rule",
    "recall",
    "CE gap",
    "gap − mage's",
    "needles",
    f"needles, {STEPS} steps",
    "found",
    "copied",
    "forwards / block: needles",
    "text",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the tables, in the order of COLUMNS."""
    return [
        row["label"],
        _shown(row.get("recall"), 3),
        _shown(row.get("ce_gap"), 3, sign=True),
        _shown(row.get("against_mage", {}).get("ce"), 3, sign=True),
        _shown(row.get("needles"), 2),
        _shown(row.get("stepped_needles"), 2),
        _shown(row.get("stepped_found"), 2),
        _shown(row.get("copy_found"), 2),
        _shown(row.get("forwards_per_block"), 2),
        _shown(row.get("text_forwards_per_block"), 1),
    ]


def short_markdown(result: Mapping[str, Any], budget: int = 128) -> str:
    """One table of all budgets without intervals: the gap at each, what is decoded at one; best gap there first."""
    budgets = result["settings"]["budgets"]
    by_label: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in result["rows"][1:]:
        by_label[row["label"]][row["budget"]] = row
    columns = [*(f"gap@{k}" for k in budgets), f"recall@{budget}", f"needles@{budget}", f"forwards@{budget}"]
    lines = [f"| rule | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    exact = result["rows"][0]
    decoded = ("stepped_needles", 2), ("text_forwards_per_block", 1)
    without = [""] * (len(budgets) + 1) + [f"{exact[name]['mean']:.{n}f}" for name, n in decoded]
    lines.append(f"| exact | {' | '.join(without)} |")
    for label, rows in sorted(by_label.items(), key=lambda item: item[1][budget]["ce_gap"]["mean"]):
        gaps = [f"{rows[k]['ce_gap']['mean']:.3f}" for k in budgets]
        at = rows[budget]
        found = [f"{at['recall']['mean']:.3f}", *(f"{at[name]['mean']:.{n}f}" for name, n in decoded)]
        lines.append(f"| {label} | {' | '.join(gaps + found)} |")
    return "\n".join(lines)


def in_both_styles(draw: Callable[[Path], None], path: Path) -> None:
    """Draw on white, and for dark pages on black beside it (NAME-dark.png)."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    for style, target in (("default", path), ("dark_background", path.with_stem(f"{path.stem}-dark"))):
        with plt.style.context(style):
            draw(target)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Gap against k of every rule, light and dark."""
    in_both_styles(lambda target: draw(result, target), path)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Gap against k of every rule, the worst at the smallest budget first in the legend."""
    import matplotlib.pyplot as plt

    gaps: dict[str, dict[int, float]] = defaultdict(dict)
    for row in result["rows"][1:]:
        gaps[row["label"]][row["budget"]] = row["ce_gap"]["mean"]
    budgets = result["settings"]["budgets"]
    ordered = sorted(gaps, key=lambda label: -gaps[label][budgets[0]])
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for i, label in enumerate(ordered):
        color, width = ("#1f6feb", 2.5) if label == "mage" else (plt.colormaps["tab20"](i / len(ordered)), 1.2)
        means = [gaps[label][k] for k in budgets]
        axes.plot(budgets, means, "o-", label=label, color=color, markersize=4, linewidth=width)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(k) for k in budgets])
    axes.axhline(0, color=plt.rcParams["text.color"], linewidth=0.8)
    axes.set(xlabel="keys kept, k", ylabel="CE gap to exact attention, nats")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown(found: Mapping[str, float] | None, digits: int, sign: bool = False) -> str:
    if found is None:
        return "-"
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{found['mean']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """The same tables on a terminal."""
    for budget in result["settings"]["budgets"]:
        table = Table(title=f"k = {budget}", title_justify="left")
        for i, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in result["rows"]:
            if row["budget"] in (None, budget):
                table.add_row(*cells(row))
        console.print(table)


def settings_of(arguments: argparse.Namespace) -> Eval:
    """The settings of `mage-tune eval` that say the same, checked as a recipe's are."""
    given = {
        "context": arguments.context,
        "documents": arguments.windows,
        "blocks": arguments.blocks,
        "budgets": sorted(set(arguments.budgets)),
        "dense_layers": arguments.dense_layers,
        "needles": arguments.needles if arguments.questions else 0,
        "questions": arguments.questions or 1,
        "threshold": arguments.threshold,
    }
    return override_section(Eval(text=arguments.text), [f"{name}={value}" for name, value in given.items()])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, check, measure and summarise."""
    settings = settings_of(arguments)
    lm = load(arguments.model, adapter=arguments.adapter, dtype="float32", device=arguments.device)
    check_settings(settings, lm)
    tokens = load_ids(arguments.text, lm.tokenizer, lm.family)
    batch = max(1, arguments.batch or (32 if lm.device.type == "cuda" else 1))
    about = {"text_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(), "dtype": str(lm.dtype), "batch": batch}
    about |= {"steps": min(STEPS, lm.family.block_size)}

    last = time.perf_counter()

    def keep(measured: Measured) -> None:
        nonlocal last
        if time.perf_counter() - last >= KEEP_EVERY:
            write(arguments.out, result_of(arguments, settings, about, measured))
            last = time.perf_counter()

    measured = measure(
        lm,
        tokens,
        settings,
        seconds=arguments.seconds,
        batch=batch,
        continuations=arguments.continuations,
        keep=keep,
    )
    return result_of(arguments, settings, about, measured)


def write(path: Path, result: dict[str, Any]) -> None:
    """The results file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1) + "\n")


def result_of(
    arguments: argparse.Namespace, settings: Eval, about: Mapping[str, Any], measured: Measured
) -> dict[str, Any]:
    """What the results file holds; `about` is what only the loaded model and text can tell."""
    return {
        "settings": {
            "model": shown(arguments.model),
            "adapter": shown(arguments.adapter),
            "text": shown(arguments.text),
            **about,
            "seed": SEED,
            "reveals": REVEALS,
            "context": settings.context,
            "blocks": settings.blocks,
            "budgets": settings.budgets,
            "dense_layers": settings.dense_layers,
            "threshold": settings.threshold,
            "needles": settings.needles,
            "asked": TASKS["multi"],
            "windows": {"given": settings.documents, "done": len(measured.windows), "numbers": measured.windows},
            "questions": {"given": arguments.questions, "done": measured.done("")},
            "continuations": {"given": arguments.continuations, "done": measured.done("text_")},
            "seconds": {"given": arguments.seconds} | measured.seconds,
        },
        "environment": environment() | ({"commit": arguments.commit} if arguments.commit else {}),
        "definitions": DEFINITIONS,
        "rows": summarise(measured, settings),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder or Hub id")
    parser.add_argument("text", nargs="?", help="held-out text or its token ids (.npy)")
    parser.add_argument("out", nargs="?", type=Path, help="JSON file to write, in results/")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the Markdown tables of a result")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --table: draw the gap of every rule instead")
    parser.add_argument("--adapter", help="adapter to load on top")
    parser.add_argument("--seconds", type=float, default=240.0, help="time for measuring, loading not counted")
    parser.add_argument("--windows", type=int, default=96, help="windows to probe at most")
    parser.add_argument("--blocks", type=int, default=8, help="blocks probed per window")
    parser.add_argument("--questions", type=int, default=96, help="questions to ask at most; 0 for none")
    parser.add_argument("--continuations", type=int, default=96, help="windows to continue at most; 0 for none")
    parser.add_argument("--batch", type=int, help="prompts per batch; 1 on a CPU, 32 on a GPU")
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256], help="keys per KV head")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dense-layers", type=int, default=2)
    parser.add_argument("--needles", type=int, default=13, help="needles in a haystack")
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence that accepts a token")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="the toolkit's commit, where the run is made on a copy without its history")
    arguments = parser.parse_args(argv)
    if arguments.table is None and arguments.out is None:
        parser.error("give MODEL, TEXT and OUT, or --table JSON")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = parse(argv)
    try:
        if arguments.table is not None:
            result = json.loads(arguments.table.read_text())
            if arguments.plot is None:
                print(markdown(result))
            else:
                plot(result, arguments.plot)
            return 0
        result = run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(arguments.out, result)
    console = Console()
    print_table(result, console if console.is_terminal else Console(width=220))
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
