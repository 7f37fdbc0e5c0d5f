"""The plots of a report, each drawn twice: on paper white and on a dark page.

One colour means one arm everywhere (blue: base, orange: adapter; told apart by every common kind of colour blindness,
and by marker as well). Figures are narrow, so that their text stays readable on a phone.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
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
    settings = result["settings"]
    plots = [
        make_plot(
            "ce_gap",
            "What sparse attention costs",
            "Cross-entropy of held-out masked tokens, less that of exact attention, against the keys kept per KV head "
            "(k). Solid (mask-k): keys chosen at the all-[MASK] step, with 95 % intervals. Dashed (oracle-k): at the "
            "step that uses them. The closer the solid line to the dashed one, the better the foresight.",
            lambda theme: ce_gap(result, theme),
        ),
        make_plot(
            "recall_by_layer",
            "Recall, layer by layer",
            "Share of a later step's own top-k keys that the all-[MASK] step had chosen. "
            f"The first {settings['dense_layers']} layers stay exact and are left out.",
            lambda theme: recall_by_layer(result, theme),
        ),
    ]
    if result["records"]["base"]["needles"]:
        plots.append(
            make_plot(
                "needles",
                "Needles in a haystack",
                "Share of questions answered right, and denoising forward passes per block, with exact and with sparse "
                "attention. Bars: 95 % intervals.",
                lambda theme: needle_bars(result, theme),
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


def ce_gap(result: Result, theme: Theme) -> Figure:
    """Cross-entropy above exact attention against k, keys chosen at the all-[MASK] step and at the same step."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    budgets = np.array(result["settings"]["budgets"], dtype=float)
    axes.axhline(0, color=theme.ink, linewidth=1.2)
    for place, (arm, found) in enumerate(result["arms"].items()):
        exact = found["ce_exact"]["mean"]
        gaps = [found[f"ce_gap@{k:.0f}"] for k in budgets]
        mean = np.array([gap["mean"] for gap in gaps])
        ends = [mean - [gap["low"] for gap in gaps], [gap["high"] for gap in gaps] - mean]
        oracle = [found[f"ce_oracle@{k:.0f}"]["mean"] - exact for k in budgets]
        beside = budgets * 2 ** (0.05 * place)  # so that intervals of two arms do not hide each other
        look: dict[str, Any] = {"color": theme.arms[arm], "marker": MARKERS[arm]}
        axes.errorbar(beside, mean, yerr=ends, capsize=3, fmt="none", ecolor=theme.arms[arm])
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


def recall_by_layer(result: Result, theme: Theme) -> Figure:
    """Recall of every layer that is ever sparse; one panel per k, one line per arm."""
    settings = result["settings"]
    budgets, first = settings["budgets"], settings["dense_layers"]
    figure = Figure(figsize=(WIDTH, 0.9 + 1.4 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), sharex=True, squeeze=False)[:, 0]
    recall = {
        arm: np.mean([block["recall_by_layer"] for block in found["text"]], axis=0)  # (budgets, layers)
        for arm, found in result["records"].items()
    }
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


def needle_bars(result: Result, theme: Theme) -> Figure:
    """Right answers and forwards per block: every task with every kind of attention."""
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    tasks = result["records"]["base"]["needles"]
    groups = [(task, attention) for task, arms in tasks.items() for attention in arms]
    budget = result["settings"]["needle_budget"]
    names = [f"{task}\n{attention}" + ("" if attention == "exact" else f" k={budget}") for task, attention in groups]
    arms = list(result["arms"])
    width = 0.76 / len(arms)
    for axes, suffix, label in zip(panels, ("", "_forwards"), ("questions right", "forwards per block"), strict=True):
        for place, arm in enumerate(arms):
            found = [result["arms"][arm][f"{task}_{attention}{suffix}"] for task, attention in groups]
            at = np.arange(len(groups)) + (place - (len(arms) - 1) / 2) * width
            mean = np.array([estimate["mean"] for estimate in found])
            ends = [mean - [e["low"] for e in found], [e["high"] for e in found] - mean]
            axes.bar(at, mean, width * 0.94, color=theme.arms[arm], label=arm)
            axes.errorbar(at, mean, yerr=np.maximum(ends, 0), fmt="none", ecolor=theme.ink, capsize=3, elinewidth=1.2)
        axes.set_ylabel(label)
        axes.set_xticks(np.arange(len(groups)), names)
        axes.tick_params(axis="x", length=0)
    panels[0].set_ylim(0, 1.02)
    panels[0].tick_params(labelbottom=True)
    legend_above(panels[0])
    return figure


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
