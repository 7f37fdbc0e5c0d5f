"""The plots of a report, each drawn twice: on paper white and on a dark page.

One colour means one arm everywhere (blue: base, orange: adapter; told apart by every common kind of colour blindness,
and by marker as well). Figures are narrow, so that their text stays readable on a phone.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image

Result = dict[str, Any]

WIDTH = 4.5
"""Inches; at 10 points of text that is readable at 360 pixels."""
DPI = 216
COLOURS = 64
"""Size of a PNG's palette: enough for smooth edges, a quarter of the bytes."""
SMOOTH_FROM = 30
"""Logged steps from which a training curve gets a running mean."""
TERMS = {
    "loss": "loss",
    "diffusion": "diffusion (nats)",
    "query_alignment": "query alignment",
    "attention_alignment": "attention alignment (nats)",
    "sparse_distillation": "sparse distillation (nats)",
}
"""Keys of metrics.jsonl that are drawn -> label."""


@dataclass(frozen=True)
class Theme:
    """Colours of one page: paper, text, quiet lines, and one colour per arm."""

    paper: str
    ink: str
    quiet: str
    arms: dict[str, str]

    def settings(self) -> dict[Any, Any]:
        """matplotlib's rcParams."""
        return {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "xtick.color": self.ink,
            "ytick.color": self.ink,
            "axes.edgecolor": self.quiet,
            "grid.color": self.quiet,
            "grid.alpha": 0.45,
            "grid.linewidth": 0.6,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "axes.titlesize": 10,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 5.5,
        }


LIGHT = Theme("#ffffff", "#1f2328", "#b6bcc4", {"base": "#0072b2", "adapter": "#d55e00"})
DARK = Theme("#161b22", "#e6edf3", "#57606a", {"base": "#56b4e9", "adapter": "#f0a030"})
MARKERS = {"base": "o", "adapter": "D"}


@dataclass(frozen=True)
class Plot:
    """One figure as PNG bytes for both themes, with the words around it."""

    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes


def draw_plots(result: Result, log: list[dict[str, Any]]) -> list[Plot]:
    """Every plot that the result, and the training log if there is one, has data for."""
    plots = []
    for task in tasks_of(result, "text"):
        suffix, words = ("", "") if task == "text" else (f"_{task}", f" ({task})")
        dense = result["tasks"][task]["settings"]["dense_layers"]
        plots += [
            make_plot(
                f"ce_gap{suffix}",
                f"What sparse attention costs{words}",
                "Cross-entropy of held-out masked tokens, less that of exact attention, against the keys kept per KV "
                "head (k). Solid (mask-k): keys chosen at the all-[MASK] step, with 95 % intervals. Dashed (oracle-k): "
                "at the step that uses them. The closer the solid line to the dashed one, the better the foresight.",
                partial(ce_gap, result, task),
            ),
            make_plot(
                f"recall_by_layer{suffix}",
                f"Recall, layer by layer{words}",
                "Share of a later step's own top-k keys that the all-[MASK] step had chosen. "
                f"{dense_words(dense)} left out.",
                partial(recall_by_layer, result, task),
            ),
        ]
    for task in tasks_of(result, "layers"):
        plots.append(
            make_plot(
                task,
                "Where the cost of an early choice comes from",
                "What is won in cross-entropy (nats per token) where this layer alone may choose its keys at the very "
                "step, all others keeping those of the all-[MASK] step. Higher: choosing early costs more here.",
                partial(layer_gains, result, task),
            )
        )
    for task in tasks_of(result, "rules"):
        plots.append(
            make_plot(
                task,
                "What each selection rule costs",
                "Cross-entropy of held-out masked tokens under each rule, less that of exact attention on the same "
                "windows. Bars: 95 % intervals.",
                partial(rule_gaps, result, task),
            )
        )
    own = [task for kind in KINDS_SCORED for task in tasks_of(result, kind)]
    if own:
        is_needles = all(result["tasks"][task]["kind"] == "needles" for task in own)
        title = "Needles in a haystack" if is_needles else "Needles and copies"
        what = (
            "share of questions answered right"
            if result["suite"] is None
            else "share of values found and of tokens copied"
        )
        plots.append(score_plot(result, "needles" if is_needles else "scores", title, what, own))
    others = dict.fromkeys(facts["kind"] for facts in result["tasks"].values())
    for kind in others:
        if kind not in KINDS_SCORED and kind not in KINDS_PROBED:
            plots.append(
                score_plot(result, f"scores_{kind}", kind, f"score in tasks of {kind}", tasks_of(result, kind))
            )
    for task in tasks_of(result, "needles"):
        if "depths" in result["tasks"][task]["settings"]:
            plots.append(
                make_plot(
                    task,
                    str(result["tasks"][task]["title"]),
                    "Share of the values asked for that were found, by where in the haystack they stand (0: at the "
                    "beginning) and by the length of the prompt.",
                    partial(needle_maps, result, task),
                )
            )
    if log:
        plots.append(
            make_plot(
                "training",
                "Training",
                "The loss and its terms (before weighting) against the optimizer step. Pale: as logged; "
                "strong: running mean.",
                lambda theme: training_curves(log, theme),
            )
        )
    return plots


def score_plot(result: Result, name: str, title: str, what: str, tasks: list[str]) -> Plot:
    """Bars of some tasks; of many arms only exact attention and the first sparse one."""
    readings = list(dict.fromkeys(reading for task in tasks for reading in result["tasks"][task]["arms"]))
    shown, note = readings, ""
    if len(readings) > 2 and len(tasks) * len(readings) > MOST_BARS:
        shown, note = readings[:2], f" Of {len(readings)} arms these two; the tables above have all."
    return make_plot(
        name,
        title,
        f"{what.capitalize()}, and denoising forward passes per block, with exact and with sparse attention. Bars: "
        f"95 % intervals.{note}",
        partial(score_bars, result, tasks, shown),
    )


def dense_words(count: int) -> str:
    """ "The first 2 layers stay exact and are"."""
    return "The first layer stays exact and is" if count == 1 else f"The first {count} layers stay exact and are"


KINDS_PROBED = frozenset({"text", "layers", "rules"})
KINDS_SCORED = ("needles", "continuation")
MOST_BARS = 40
"""Bars of one side in one panel; with more, only two arms are drawn."""


def tasks_of(result: Result, kind: str) -> list[str]:
    """Names of the tasks of a kind, in order."""
    return [task for task, facts in result["tasks"].items() if facts["kind"] == kind]


def keys_of(result: Result, task: str) -> dict[tuple[str, str], str]:
    """(metric, reading) -> key of a task's numbers."""
    found = {key: info for key, info in result["metrics"].items() if info["task"] == task}
    return {(info["metric"], info["reading"]): key for key, info in found.items()}


def make_plot(name: str, title: str, caption: str, draw: Callable[[Theme], Figure]) -> Plot:
    """Draw a figure in both themes."""
    pages = []
    for theme in (LIGHT, DARK):
        with mpl.rc_context(theme.settings()):
            pages.append(png(draw(theme)))
    return Plot(name, title, caption, *pages)


def png(figure: Figure) -> bytes:
    """A figure as a PNG with a small palette."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=DPI)
    Image.open(full).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def ce_gap(result: Result, task: str, theme: Theme) -> Figure:
    """Cross-entropy above exact attention against k, keys chosen at the all-[MASK] step and at the same step."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    keys = {metric: key for (metric, _), key in keys_of(result, task).items()}
    budgets = np.array(result["tasks"][task]["settings"]["budgets"], dtype=float)
    axes.axhline(0, color=theme.ink, linewidth=1.2)
    for place, (arm, found) in enumerate(result["arms"].items()):
        exact = found[keys["ce_exact"]]["mean"]
        gaps = [found[keys[f"ce_gap@{k:.0f}"]] for k in budgets]
        mean = np.array([gap["mean"] for gap in gaps])
        ends = [mean - [gap["low"] for gap in gaps], [gap["high"] for gap in gaps] - mean]
        oracle = [found[keys[f"ce_oracle@{k:.0f}"]]["mean"] - exact for k in budgets]
        beside = budgets * 2 ** (0.05 * place)  # so that intervals of two arms do not hide each other
        look: dict[str, Any] = {"color": theme.arms[arm], "marker": MARKERS[arm]}
        axes.errorbar(beside, mean, yerr=np.maximum(ends, 0), capsize=3, fmt="none", ecolor=theme.arms[arm])
        axes.plot(beside, mean, label=f"{arm}, mask-k", **look)
        axes.plot(beside, oracle, linestyle="--", markerfacecolor=theme.paper, label=f"{arm}, oracle-k", **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{k:.0f}" for k in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(budgets[0] / 1.3, budgets[-1] * 1.3)
    axes.set_xlabel("keys kept per KV head, k")
    axes.set_ylabel("CE above exact (nats per token)")
    axes.annotate("exact attention", (0.01, 0), (0, 3), axes.get_yaxis_transform(), "offset points", fontsize=8.5)
    legend_above(axes)
    return figure


def recall_by_layer(result: Result, task: str, theme: Theme) -> Figure:
    """Recall of every layer that is ever sparse; one panel per k, one line per arm."""
    settings = result["tasks"][task]["settings"]
    budgets, first = settings["budgets"], settings["dense_layers"]
    figure = Figure(figsize=(WIDTH, 0.9 + 1.4 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), sharex=True, squeeze=False)[:, 0]
    recall = {}
    for arm, found in result["records"].items():
        windows = found[task]["exact"]
        blocks = [block["recall_by_layer"] for window in windows for block in window["facts"]["blocks"]]
        recall[arm] = np.mean(blocks, axis=0)  # (budgets, layers)
    for i, (axes, k) in enumerate(zip(panels, budgets, strict=True)):
        for arm, values in recall.items():
            layers = np.arange(first, first + values.shape[1])
            axes.plot(layers, values[i], color=theme.arms[arm], marker=MARKERS[arm], markersize=3.5, label=arm)
        axes.set_ylabel(f"recall@{k}")
        axes.margins(y=0.15)
    panels[-1].set_xlabel("layer")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    legend_above(panels[0])
    return figure


def layer_gains(result: Result, task: str, theme: Theme) -> Figure:
    """What each layer's own choice wins; one bar a layer and side."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(result["records"])
    for place, (arm, found) in enumerate(result["records"].items()):
        windows = [window["facts"] for window in found[task]["exact"]]
        gains = np.mean([facts["gain_by_layer"] for facts in windows], axis=0)
        layers = windows[0]["first_layer"] + np.arange(len(gains)) + (place - (len(result["records"]) - 1) / 2) * width
        axes.bar(layers, gains, width, color=theme.arms[arm], label=arm)
    axes.axhline(0, color=theme.ink, linewidth=1.0)
    axes.set_xlabel("layer")
    axes.set_ylabel("CE won (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes)
    return figure


def rule_gaps(result: Result, task: str, theme: Theme) -> Figure:
    """Cross-entropy of every sparse arm above exact attention."""
    keys = keys_of(result, task)
    readings = [reading for metric, reading in keys if metric == "ce" and reading != "exact"]
    names = [result["metrics"][keys["ce", reading]]["shown"] for reading in readings]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * max(2, len(readings))), layout="constrained")
    axes = figure.subplots()
    found = {side: [gaps[keys["ce", r]] for r in readings] for side, gaps in result["against_exact"].items()}
    horizontal_bars(axes, found, names, theme)
    axes.axvline(0, color=theme.ink, linewidth=1.0)
    axes.set_xlabel("CE above exact (nats per token)")
    legend_above(axes)
    return figure


def score_bars(result: Result, tasks: list[str], readings: list[str], theme: Theme) -> Figure:
    """Headline score and forwards per block: every task with every kind of attention."""
    shown = []
    for task in tasks:
        keys = keys_of(result, task)
        score = score_metric(result, task)
        for reading in (reading for reading in result["tasks"][task]["arms"] if reading in readings):
            score_key, cost_key = keys.get((score or "", reading)), keys.get(("forwards", reading))
            name = next(info["shown"] for info in result["metrics"].values() if info["reading"] == reading)
            short = task.removeprefix(f"{result['tasks'][task]['kind']}_")
            shown.append((f"{short}, {name}", score_key, cost_key))
    panels = [("score", [(n, s) for n, s, _ in shown if s]), ("forwards per block", [(n, c) for n, _, c in shown if c])]
    panels = [panel for panel in panels if panel[1]]
    heights = [len(rows) + 1.5 for _, rows in panels]
    figure = Figure(figsize=(WIDTH, 0.5 + 0.28 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (label, rows) in zip(grid, panels, strict=True):
        found = {side: [arms[key] for _, key in rows] for side, arms in result["arms"].items()}
        horizontal_bars(axes, found, [name for name, _ in rows], theme)
        axes.set_xlabel(label)
        is_share = all(0 <= one["high"] <= 1 for side in found.values() for one in side)
        axes.set_xlim(0, 1.02 if label == "score" and is_share else None)
    legend_above(grid[0])
    return figure


def score_metric(result: Result, task: str) -> str | None:
    """A task's headline, else its first number; None where it only has costs."""
    mine = [info for info in result["metrics"].values() if info["task"] == task and not info["is_cost"]]
    return next((info["metric"] for info in mine if info["is_headline"]), mine[0]["metric"] if mine else None)


def horizontal_bars(axes: Axes, found: dict[str, list[dict[str, float]]], names: list[str], theme: Theme) -> None:
    """One group of bars a name, one bar a side, with intervals; the first name on top."""
    height = 0.78 / len(found)
    for place, (side, estimates) in enumerate(found.items()):
        at = np.arange(len(names)) + (place - (len(found) - 1) / 2) * height
        mean = np.array([estimate["mean"] for estimate in estimates])
        ends = [mean - [e["low"] for e in estimates], [e["high"] for e in estimates] - mean]
        axes.barh(at, mean, height * 0.94, color=theme.arms[side], label=side)
        look: dict[str, Any] = {"fmt": "none", "ecolor": theme.ink, "capsize": 2, "elinewidth": 1.0}
        axes.errorbar(mean, at, xerr=np.maximum(ends, 0), **look)
    axes.set_yticks(np.arange(len(names)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")


def needle_maps(result: Result, task: str, theme: Theme) -> Figure:
    """Values found by depth and length: a row for every kind of attention, a column for every side."""
    settings = result["tasks"][task]["settings"]
    lengths, sides = settings["lengths"], list(result["records"])
    readings = list(result["tasks"][task]["arms"])
    bins = depth_bins(settings["depths"])
    size = WIDTH, 0.6 + len(readings) * (0.45 + max(0.9, 0.24 * (len(bins) - 1)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(readings), len(sides), squeeze=False, sharex=True, sharey=True)
    image = None
    colours = mpl.colormaps["cividis"].with_extremes(bad=theme.quiet)
    for row, reading in enumerate(readings):
        for column, side in enumerate(sides):
            axes = panels[row][column]
            share = found_by_depth(result["records"][side][task][reading], lengths, bins)
            image = axes.imshow(share, vmin=0, vmax=1, cmap=colours, aspect="auto", interpolation="nearest")
            for (y, x), value in np.ndenumerate(share):
                if np.isfinite(value):
                    ink = "#ffffff" if value < 0.6 else "#000000"
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=7.5)
            axes.grid(visible=False)
            shown = next(info["shown"] for info in result["metrics"].values() if info["reading"] == reading)
            axes.set_title(f"{side}, {shown}", fontsize=9, color=theme.arms[side])
            axes.set_xticks(np.arange(len(lengths)), [length_name(length) for length in lengths], fontsize=8)
            middles = (bins[:-1] + bins[1:]) / 2
            axes.set_yticks(np.arange(len(middles)), [f"{100 * middle:.0f} %" for middle in middles], fontsize=8)
            axes.tick_params(length=0)
    figure.supylabel("depth", fontsize=9)
    figure.supxlabel("tokens", fontsize=9)
    assert image is not None
    return figure


def depth_bins(depths: list[float]) -> np.ndarray:
    """Borders between the depths asked for, from 0 to 1: values of one question stand at several."""
    middle = np.array(sorted(depths))
    return np.concatenate([[0.0], (middle[:-1] + middle[1:]) / 2, [1.0]])


def found_by_depth(records: list[dict[str, Any]], lengths: list[int], bins: np.ndarray) -> np.ndarray:
    """(depths, lengths) share of the values that were found; NaN where none stood."""
    found, asked = np.zeros((len(bins) - 1, len(lengths))), np.zeros((len(bins) - 1, len(lengths)))
    for record in records:
        facts = record["facts"]
        column = lengths.index(facts["length"])
        for depth, is_found in zip(facts["depths"], facts["found"], strict=True):
            row = min(int(np.searchsorted(bins, depth, side="right")) - 1, len(bins) - 2)
            found[row, column] += is_found
            asked[row, column] += 1
    return np.divide(found, asked, out=np.full_like(found, np.nan), where=asked > 0)


def length_name(tokens: int) -> str:
    """512, 4K, 128K."""
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def training_curves(log: list[dict[str, Any]], theme: Theme) -> Figure:
    """The loss and every term that was on, one panel each; logarithmic where a term falls by more than 20 times."""
    terms = [name for name in TERMS if any(name in line for line in log)]
    figure = Figure(figsize=(WIDTH, 0.6 + 1.35 * len(terms)), layout="constrained")
    panels = figure.subplots(len(terms), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, terms, strict=True):
        lines = [line for line in log if name in line]
        steps = np.array([line["step"] for line in lines])
        values = np.array([line[name] for line in lines], dtype=float)
        is_long = len(values) >= SMOOTH_FROM
        axes.plot(steps, values, color=theme.arms["adapter"], alpha=0.35 if is_long else 1.0, linewidth=1.2)
        if is_long:
            axes.plot(*running_mean(steps, values, len(values) // 15), color=theme.arms["adapter"])
        if 0 < 20 * values.min() < values.max():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(TERMS[name], loc="left")
    panels[-1].set_xlabel("optimizer step")
    return figure


def running_mean(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of `width` neighbouring values, at the mean of their steps."""
    window = np.full(width, 1 / width)
    return np.convolve(steps, window, "valid"), np.convolve(values, window, "valid")


def legend_above(axes: Axes) -> None:
    """A legend over the plot, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.4)
