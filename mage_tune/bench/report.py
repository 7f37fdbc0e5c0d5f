"""What a run shows: a table with the floor beside each figure, JSON, and two kinds of plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table

from mage_tune.bench.cases import label

Row = dict[str, Any]


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """Write a result, if it is wanted."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def row_label(row: Row) -> str:
    """Rule, kernel, dense layers, eager or not."""
    return label(row["rule"], row["exact_kernel"], row["dense_layers"], row["graph"], row.get("fused", False))


def describe(row: Row) -> str:
    """One line about a row, while the run goes on."""
    sparse = "" if row["sparse_ms"] is None else f", sparse step {row['sparse_ms']:.2f}"
    where = f"{row['model']} {row['context']} b{row['batch']} S={row['steps']}"
    block = f"block {row['block_ms']:.1f} ms (floor {row['floor_ms']:.1f})"
    return f"{where} {row_label(row)}: {block}, exact step {row['exact_ms']:.2f}{sparse}"


def cell(row: Row) -> tuple[Any, ...]:
    """What rows that are compared with each other share."""
    return row["model"], row["context"], row["batch"], row["steps"], row["acceptance"]


def strongest_exact(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    """The fastest exact row of every cell."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["rule"] == "exact" and row["block_ms"] < best.get(cell(row), {"block_ms": float("inf")})["block_ms"]:
            best[cell(row)] = row
    return best


def print_table(rows: list[Row], console: Console) -> None:
    """Everything measured, in ms, floors in brackets; the prefix holds random keys, and the commit is counted."""
    if not rows:
        return
    table = Table(
        title="ms per output block: steps and commit, over random keys; floors in brackets", title_justify="left"
    )
    for name in ("model", "context", "batch", "S", "rule"):
        table.add_column(name, no_wrap=True)
    for name in ("block", "exact step", "sparse step", "commit", "select", "GiB", "against exact"):
        table.add_column(name, justify="right", no_wrap=True)
    best = strongest_exact(rows)
    for row in sorted(rows, key=lambda r: (*map(str, cell(r)[:1]), *cell(r)[1:4], r["block_ms"])):
        table.add_row(
            row["model"],
            _tokens(row["context"]),
            str(row["batch"]),
            f"{row['steps']}" + ("*" if row["acceptance"] == "threshold" else ""),
            row_label(row),
            _with_floor(row["block_ms"], row["floor_ms"]),
            _with_floor(row["exact_ms"], row["exact_floor_ms"]),
            _with_floor(row["sparse_ms"], row["sparse_floor_ms"]),
            _with_floor(row["commit_ms"], row["exact_floor_ms"]),
            "" if row["select_ms"] is None else f"{row['select_ms']:.3f}",
            "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
            f"{best[cell(row)]['block_ms'] / row['block_ms']:.2f}x" if cell(row) in best else "",
        )
    console.print(table)
    if any(row["acceptance"] == "threshold" for row in rows):
        console.print("* threshold decoding: the steps it took, its flag read after each")


def _with_floor(ms: float | None, floor: float | None) -> str:
    if ms is None or floor is None:
        return ""
    return f"{ms:.2f} ({floor:.2f})"


def draw_plots(rows: list[Row], folder: Path) -> list[Path]:
    """Time per block against context, and speed-ups over each exact kernel at the longest context, per model and batch.

    Only fixed steps, the most there are, by graphs. A plot that would show nothing is not drawn.

    Returns:
        The PNG files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    rows = [row for row in rows if row["acceptance"] == "static" and row["graph"]]
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        steps = max(row["steps"] for row in mine)
        mine = [row for row in mine if row["steps"] == steps]
        for kind, draw in (("context", _draw_contexts), ("speedup", _draw_speedups)):
            figure = Figure(figsize=(7, 4.2), layout="constrained")
            if draw(figure.subplots(), mine):
                figure.suptitle(f"{model}, batch {batch}, S = {steps}, commit included")
                files.append(folder / f"{model}-b{batch}-{kind}.png")
                figure.savefig(files[-1], dpi=144)
    return files


def _draw_contexts(axes: Axes, rows: list[Row]) -> bool:
    """One line for everything timed at several contexts; exact ones dashed. Whether there was any."""
    lines = {
        name: sorted((row["context"], row["block_ms"]) for row in rows if row_label(row) == name)
        for name in dict.fromkeys(map(row_label, rows))
    }
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    for number, (name, points) in enumerate(lines.items()):
        style = "--" if name.startswith("exact") else "-"
        axes.plot(*zip(*points, strict=True), style, marker="osDv^<>P"[number % 8], color=f"C{number % 10}", label=name)
    if not lines:
        return False
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    contexts = sorted({context for points in lines.values() for context, _ in points})
    axes.set_xticks(contexts, list(map(_tokens, contexts)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("ms per output block")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return True


def _draw_speedups(axes: Axes, rows: list[Row]) -> bool:
    """A group of bars for every sparse rule, one bar for every exact kernel. Whether there were both."""
    longest = max(row["context"] for row in rows)
    rows = [row for row in rows if row["context"] == longest]
    exact = [row for row in rows if row["rule"] == "exact"]
    sparse = sorted((row for row in rows if row["rule"] != "exact"), key=lambda row: row["block_ms"])
    if not exact or not sparse:
        return False
    height = 0.8 / len(exact)
    for number, against in enumerate(exact):
        ratios = [against["block_ms"] / row["block_ms"] for row in sparse]
        places = [i + number * height for i in range(len(sparse))]
        bars = axes.barh(places, ratios, height, label=f"over {row_label(against)}")
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(sparse))], list(map(row_label, sparse)))
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.08)
    axes.invert_yaxis()
    axes.set_xlabel(f"times faster per block at {_tokens(longest)} tokens")
    axes.legend(fontsize=8)
    return True


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
