"""How many keys each layer should keep: where the gap comes from, measured, and the same number of keys spent better.

    python scripts/layer_budgets.py models/smollm2-135m-diffusion data/debian-docs/train.u16.npy --name base
    python scripts/layer_budgets.py models/smollm2-135m-diffusion data/debian-docs/train.u16.npy --name recipe \\
        --adapter runs/smollm2-135m
    python scripts/layer_budgets.py --table results/layer_budgets.json

Windows of *training* text: held-out text is for judging. For each sparse layer alone and each of a few numbers of keys,
the other layers keeping theirs: the cross-entropy of the still masked tokens of partly revealed blocks, keys chosen at
the all-[MASK] step. Then the numbers of keys of least summed cross-entropy, of those that are --budget a layer on
average. Layers do not simply add up, so that is measured again around what came out, --rounds times, and the best whole
set of numbers measured is kept: the same number of keys in every layer is one of them.

The result, under --name in --out, is a value for the rule option `layer_budgets` of `mage`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compare_rules import open_window
from rich.console import Console

from mage_tune import load
from mage_tune.backbone import causal_lm
from mage_tune.data.text import load_ids
from mage_tune.decode.attention import Selection, block_forward
from mage_tune.decode.rules import Mage, Observed
from mage_tune.decode.steps import Choice
from mage_tune.environment import environment
from mage_tune.evals.probes import REVEALS
from mage_tune.evals.run import cut_windows, shown
from mage_tune.evals.store import write_whole
from mage_tune.evals.windows import Window, look, stack

Budgets = dict[int, int]
"""Layer -> keys per KV head."""

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Numbers of keys tried in a layer, as shares of the budget."""
RESULTS = Path("results/layer_budgets.json")


def levels_of(budget: int) -> list[int]:
    """Numbers of keys tried, ascending.

    Raises:
        ValueError: the budget cannot be divided so.
    """
    if budget % 4:
        raise ValueError(f"--budget {budget} is no multiple of 4, so it has no quarters")
    return [round(share * budget) for share in SHARES]


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


def sweep(probes: Sequence[Probe], found: Budgets, levels: Sequence[int]) -> dict[int, dict[int, float]]:
    """Level -> layer -> what happens to the cross-entropy when this layer alone keeps so many keys, nats."""
    changes: dict[int, np.ndarray] = {level: np.zeros(len(found)) for level in levels}
    for probe in probes:
        at = probe.choose(found)
        (ce,) = probe.losses([at])
        for level, change in changes.items():
            change += (probe.losses(one_by_one(at, probe.choose(dict.fromkeys(found, level)))) - ce) / len(probes)
    return {level: dict(zip(found, change.tolist(), strict=True)) for level, change in changes.items()}


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


def search(probes: Sequence[Probe], layers: Sequence[int], rounds: int, console: Console) -> dict[str, Any]:
    """Rounds of sweep and allocation, from equal numbers on; the best whole set measured, and the first sweep."""
    budget = probes[0].rule.budget
    sets, changes = [dict.fromkeys(layers, budget)], []
    for number in range(rounds):
        started = time.perf_counter()
        changes.append(sweep(probes, sets[-1], levels_of(budget)))
        sets.append(allocate(changes[-1], budget))
        console.print(f"round {number + 1} of {rounds}: {time.perf_counter() - started:.0f} s", highlight=False)
    ce = np.mean([probe.losses([probe.choose(budgets) for budgets in sets]) for probe in probes], axis=0)
    best = int(ce.argmin())
    return {
        "budgets": sets[best],
        "ce": ce[best],
        "ce_equal": ce[0],
        "ce_rounds": ce.tolist(),
        "change_from_equal": changes[0],
    }


def markdown(content: Mapping[str, Any]) -> str:
    """Layers that keep more or fewer keys, a line per model."""
    lines = ["| model | equal numbers, CE | chosen, CE | keys per layer |", "|---|---:|---:|---|"]
    for name, found in content.items():
        by_keys: dict[int, list[int]] = {}
        for layer, keys in found["budgets"].items():
            by_keys.setdefault(keys, []).append(int(layer))
        parts = [f"{keys}: layers {', '.join(map(str, by_keys[keys]))}" for keys in sorted(by_keys, reverse=True)]
        lines.append(f"| {name} | {found['ce_equal']:.3f} | {found['ce']:.3f} | {'; '.join(parts)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder or Hub id")
    parser.add_argument("text", nargs="?", help="training text, as a recipe names it: .npy of token ids, .parquet, ...")
    parser.add_argument("--adapter", help="run folder or adapter")
    parser.add_argument("--name", default="model", help="of the model in the results file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=int, default=128, help="keys per KV head and layer on average")
    parser.add_argument("--dense-layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--blocks", type=int, default=4, help="blocks of a window that are probed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the Markdown table of a result")
    parser.add_argument("--commit", help="the toolkit's commit, where the run is made on a copy without its history")
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        print(markdown(json.loads(arguments.table.read_text())))
        return 0
    if arguments.model is None or arguments.text is None:
        parser.error("a model and training text are needed, unless --table is given")
    try:
        levels_of(arguments.budget)
        lm = load(arguments.model, adapter=arguments.adapter)
        tokens = load_ids(arguments.text, lm.tokenizer, lm.family)
        cut = cut_windows(tokens, arguments.context, arguments.windows)
        rule = Mage(budget=arguments.budget, dense_layers=arguments.dense_layers)
        probes = [
            Probe.of(open_window(lm, window, number, arguments.blocks), rule) for number, window in enumerate(cut)
        ]
        layers = range(rule.dense_layers, causal_lm(lm.model).config.num_hidden_layers)
        found = search(probes, layers, arguments.rounds, Console(stderr=True, width=160))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found |= {
        "settings": {k: getattr(arguments, k) for k in ("budget", "dense_layers", "context", "windows", "blocks")},
        "model": shown(arguments.model),
        "adapter": shown(arguments.adapter),
        "environment": environment() | ({"commit": arguments.commit} if arguments.commit else {}),
    }
    content = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.out, json.dumps(content | {arguments.name: found}, indent=1) + "\n")
    print(markdown({arguments.name: found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
