"""How many keys each layer should keep: where the gap comes from, measured, and the same number of keys spent better.

For each sparse layer alone and each of a few numbers of keys, the other layers keeping theirs: the cross-entropy of the
still masked tokens of partly revealed blocks, keys chosen at the all-[MASK] step. Then the numbers of keys of least
summed cross-entropy, of those that are the budget per layer on average. Layers do not simply add up, so that is
measured again around what came out, and the best whole set of numbers measured is kept: the same number of keys in
every layer is one of them. Measured on *training* text: held-out text is for judging.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table

from mage_tune.backbone import causal_lm
from mage_tune.data.text import load_ids
from mage_tune.decode.attention import Selection, block_forward
from mage_tune.decode.layer_budgets import FILE
from mage_tune.decode.rules import Mage, Observed
from mage_tune.decode.steps import Choice
from mage_tune.environment import environment
from mage_tune.evals.probes import REVEALS
from mage_tune.evals.run import SEED, cut_windows, find_target, progress, shown
from mage_tune.evals.store import write_whole
from mage_tune.evals.windows import Window, look, open_window, stack
from mage_tune.lm import BlockDiffusionLM, load
from mage_tune.recipe import load_recipe
from mage_tune.recipe_schema import TextSource

Budgets = dict[int, int]
"""Layer -> keys per KV head."""

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Numbers of keys tried in a layer, as shares of the budget."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    budget: int = 128
    """Keys per KV head and layer on average."""
    dense_layers: int = 2
    context: int = 2048
    """Tokens of a window."""
    windows: int = 24
    blocks: int = 4
    """Blocks of a window that are probed."""
    rounds: int = 2

    def levels(self) -> list[int]:
        """Numbers of keys tried, ascending.

        Raises:
            ValueError: the budget cannot be divided so.
        """
        if self.budget % 4:
            raise ValueError(f"a budget of {self.budget} is no multiple of 4, so it has no quarters")
        return [round(share * self.budget) for share in SHARES]


def run(
    target: str,
    settings: Settings,
    *,
    adapter: str | None = None,
    text: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> Path:
    """Measure, choose, and write `layer_budgets.json`.

    Args:
        target: run folder, checkpoint folder or Hub id.
        adapter: of a `target` that is a model.
        text: training text as a recipe names it; the first text source of a run's recipe by default.
        out: the file; in the run folder by default.
        force: write over a file that is there.

    Returns:
        The file.

    Raises:
        ValueError: no text or place for the file is known, the file is there, or settings that cannot be.
    """
    settings.levels()
    place, folder = find_target(target, adapter), Path(target)
    is_run = (folder / "recipe.yaml").is_file()
    if out is None and not is_run:
        raise ValueError(f"{target} is no run folder; say where the file goes: --out {FILE}")
    out = folder / FILE if out is None else out
    if out.exists() and not force:
        raise ValueError(f"{out}: exists already; --force measures again")
    text = text if text is not None or not is_run else training_text(folder)
    if text is None:
        raise ValueError(f"{target} is no run folder; name training text: --text FILE")
    lm = load(place.base, adapter=place.adapter, dtype=place.dtype)
    windows = cut_windows(load_ids(text, lm.tokenizer, lm.family), settings.context, settings.windows)
    found: dict[str, Any] = {"budget": settings.budget, "dense_layers": settings.dense_layers}
    found |= measure(lm, windows, settings)
    found |= {"settings": asdict(settings), "text": shown(text), "model": shown(place.base)}
    found |= {"adapter": shown(place.adapter), "environment": environment()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(found, indent=1) + "\n")
    show(found, Console(highlight=False))
    return out


def training_text(folder: Path) -> str:
    """The first text that a run was trained on.

    Raises:
        ValueError: its recipe names none.
    """
    for source in load_recipe(folder / "recipe.yaml").data.sources:
        if isinstance(source, TextSource):
            return source.path
    raise ValueError(f"{folder}: its recipe has no source of kind text; name training text: --text FILE")


def show(found: Mapping[str, Any], console: Console) -> None:
    """Layers by the number of keys that they keep, and what it is worth on the text it was measured on."""
    by_keys: dict[int, list[str]] = {}
    for layer, keys in found["budgets"].items():
        by_keys.setdefault(keys, []).append(str(layer))
    console.print(f"{found['budget']} keys per layer on average, spent where they count:", style="bold")
    table = Table(box=box.SIMPLE)
    table.add_column("keys", justify="right")
    table.add_column("layers")
    for keys in sorted(by_keys, reverse=True):
        table.add_row(str(keys), ", ".join(by_keys[keys]))
    console.print(table)
    console.print(
        f"cross-entropy behind the chosen keys, this training text: {found['ce_equal']:.3f} nats with "
        f"{found['budget']} everywhere, {found['ce']:.3f} so; judge it on other text"
    )


# Measuring


@dataclass(frozen=True)
class Probe:
    """A window, and what the all-[MASK] step of its blocks saw."""

    window: Window
    observed: Sequence[Observed]
    rule: Mage

    @classmethod
    @torch.no_grad()
    def of(cls, window: Window, rule: Mage) -> Probe:
        """Look once; every choice of keys is made from it."""
        return cls(window, look(window, window.start, [rule]).observed[rule], rule)

    def choose(self, budgets: Budgets) -> Selection:
        """The keys of every layer."""
        rule = replace(self.rule, layer_budgets=tuple(budgets.items()))
        return rule.choose(self.observed, self.window.lengths)

    @torch.no_grad()
    def losses(self, selections: Sequence[Selection]) -> np.ndarray:
        """(len(selections),) cross-entropy of the window's still masked tokens under each of them, nats."""
        window, times = self.window, len(selections)
        rows = [block for block in range(len(window.lengths)) for _ in REVEALS]
        chosen = stack([Choice(selection, None, []).take(rows) for selection in selections])[0]
        prefix, ids = window.prefix(len(REVEALS), times), window.later.repeat(times, 1)
        return np.array(window.losses(block_forward(window.lm.model, prefix, ids, selection=chosen), times))


def measure(lm: BlockDiffusionLM, windows: Sequence[np.ndarray], settings: Settings) -> dict[str, Any]:
    """Rounds of sweep and allocation, from equal numbers on.

    Returns:
        budgets: layer -> keys, the best whole set measured; ce, ce_equal, ce_rounds: cross-entropy under it, under
        equal numbers and under every set; change_from_equal: level -> layer -> nats, the first sweep.
    """
    rule = Mage(budget=settings.budget, dense_layers=settings.dense_layers)
    layers = range(rule.dense_layers, causal_lm(lm.model).config.num_hidden_layers)
    sets, changes = [dict.fromkeys(layers, settings.budget)], []
    with progress(settings.rounds * len(windows) * len(settings.levels())) as bar:
        bar.say("reading the windows")
        probes = [
            Probe.of(open_window(lm, window, number, settings.blocks, SEED), rule)
            for number, window in enumerate(windows)
        ]
        for number in range(settings.rounds):
            bar.say(f"round {number + 1} of {settings.rounds}")
            changes.append(sweep(probes, sets[-1], settings.levels(), bar))
            sets.append(allocate(changes[-1], settings.budget))
    ce = np.mean([probe.losses([probe.choose(budgets) for budgets in sets]) for probe in probes], axis=0)
    best = int(ce.argmin())
    return {
        "budgets": sets[best],
        "ce": float(ce[best]),
        "ce_equal": float(ce[0]),
        "ce_rounds": ce.tolist(),
        "change_from_equal": changes[0] if changes else {},
    }


def sweep(
    probes: Sequence[Probe], found: Budgets, levels: Sequence[int], on_level: Callable[[], None] = lambda: None
) -> dict[int, dict[int, float]]:
    """Level -> layer -> what happens to the cross-entropy when this layer alone keeps so many keys, nats.

    `on_level` is called after each level of each window, for progress.
    """
    changes: dict[int, np.ndarray] = {level: np.zeros(len(found)) for level in levels}
    for probe in probes:
        at = probe.choose(found)
        (ce,) = probe.losses([at])
        for level, change in changes.items():
            change += (probe.losses(one_by_one(at, probe.choose(dict.fromkeys(found, level)))) - ce) / len(probes)
            on_level()
    return {level: dict(zip(found, change.tolist(), strict=True)) for level, change in changes.items()}


def one_by_one(at: Selection, other: Selection) -> list[Selection]:
    """`at` with one layer after the other taken from `other`."""
    slots = max(at.index.shape[-1], other.index.shape[-1])
    (index, kept), (other_index, other_kept) = (
        [F.pad(x, (0, slots - x.shape[-1])) for x in (chosen.index, chosen.is_kept)] for chosen in (at, other)
    )
    found = []
    for layer in range(len(index)):
        is_layer = (torch.arange(len(index), device=index.device) == layer)[:, None, None, None]
        swapped = torch.where(is_layer, other_index, index), torch.where(is_layer, other_kept, kept)
        found.append(Selection(*swapped, first_layer=at.first_layer))
    return found


# Choosing


def allocate(change: Mapping[int, Mapping[int, float]], budget: int) -> Budgets:
    """The level of every layer with the least summed change, `budget` keys a layer at most on average.

    Args:
        change: level -> layer -> nats; levels are multiples of a quarter of the budget.

    Returns:
        Layer -> level. Exact, by dynamic programming over the quarters spent.
    """
    layers, quarter = list(next(iter(change.values()))), budget // 4
    room = 4 * len(layers)
    least, taken = np.zeros(room + 1), []
    for layer in layers:
        options = {level: np.full(room + 1, np.inf) for level in change}
        for level, values in options.items():
            cost = level // quarter
            if cost <= room:
                values[cost:] = least[: room + 1 - cost] + change[level][layer]
        table = np.stack(list(options.values()))
        taken.append(np.array(list(options))[table.argmin(0)])
        least = table.min(0)
    found, left = {}, int(least.argmin())
    for layer, level in zip(reversed(layers), reversed(taken), strict=True):
        found[layer] = int(level[left])
        left -= found[layer] // quarter
    return dict(sorted(found.items()))
