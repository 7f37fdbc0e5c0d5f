"""What going further than MAGE costs in quality, on the same held-out windows; write results/further_h100.json.

    python scripts/study_further.py models/smollm2-135m-diffusion data/debian-docs/heldout.u16.npy \\
        results/further_h100.json --seconds 120
    python scripts/study_further.py --table results/further_h100.json     # the Markdown tables of docs/performance.md

Four changes, none of them part of the decoder; scripts/bench_further.py has their speed, and the decode engine the last
one, in SDAR alone:

    large budget    0 dense layers and more keys, instead of 2 dense layers
    fp8             the first step is exact, but keys are scored from an e4m3 copy of them, scaled by channel or head
    keys-only       the first step is sparse too: layer by layer its all-[MASK] queries score every cached key, the best
                    ones are chosen, and it attends to those alone; later layers' queries come from sparse outputs. With
                    fp8, or with the block-average query in place of all of them, as options
    fused commit    the finished block and the next block's [MASK]s in one forward. It computes the same: only checked.
                    Families that seed their blocks (Fast-dLLM v2, converted models) cannot have it: the first token of
                    the next block is what the commit predicts

Windows, blocks, reveals and seeds are those of `mage-tune eval` (evals/probes.py): cross-entropy of the still masked
tokens at later steps of a block, which see the keys chosen at its all-[MASK] step. Every arm gets every window.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mage_tune import load
from mage_tune.backbone import hidden_states
from mage_tune.data.text import load_ids
from mage_tune.decode.attention import LayerView, Selection, block_forward, extend, observe_forward
from mage_tune.decode.cache import Prefix, PrefixCache
from mage_tune.decode.rules import Mage, Observed, Rule
from mage_tune.decode.steps import Choice
from mage_tune.environment import environment
from mage_tune.evals.probes import REVEALS, masked_cross_entropy
from mage_tune.evals.run import SEED, cut_windows, shown
from mage_tune.evals.stats import estimate, paired_difference
from mage_tune.evals.store import write_whole
from mage_tune.evals.windows import StackedRule, Window, look, open_window, stack
from mage_tune.selection import mean_logit, packed_rows

FP8 = torch.float8_e4m3fn
Scaled = Literal["channel", "head"]
PREDICTIONS = {
    "large budget": "0 dense layers lose more than 2 at the same budget, but 512 keys without dense layers lose less "
    "than 128 keys with two",
    "fp8": "at least 97 % of mage's keys; gap within 0.002 nats of mage's; channel no better than head",
    "keys-only": "80 to 90 % of mage's keys; gap within 0.02 nats of mage's at 128 keys, 0.005 at 512; the first "
    "step itself loses about as much as later steps do under mage",
    "keys-only, mean query": "clearly worse than all queries",
    "fused commit": "the same up to rounding",
}
DEFINITIONS = {
    "ce_gap": "cross-entropy of the still masked tokens of partly revealed blocks minus exact attention's, nats; "
    "mean over reveals and blocks of a window, paired by window, with 95 % bootstrap intervals",
    "first_ce_gap": "the same at the all-[MASK] step; null where that step is exact",
    "recall": "share of the keys that mage chooses with this budget and these dense layers that the arm chooses too",
    "against_mage": "ce under the arm minus ce under mage with this budget and these dense layers",
    "against_dense": "ce minus that of mage with 2 dense layers, by the budget of the latter",
    "prefixes": "blocks lie in the second half of a window; a budget that holds a prefix whole is exact there, which "
    "with 2048 tokens is true of the first block at 1024 keys",
}


@dataclass(frozen=True, kw_only=True)
class Shadowed(Mage):
    """MAGE that scores keys as an 8-bit copy of them has them; attention itself sees the keys."""

    name: ClassVar[str] = "mage, fp8"
    scaled: Scaled | None = None
    """What shares a scale in the e4m3 copy; None scores the keys themselves."""

    def observe(self, view: LayerView) -> Observed:
        """Mean attention probability, from the copy."""
        return super().observe(seen_in_fp8(view, self.scaled) if self.scaled else view)


@dataclass(frozen=True, kw_only=True)
class KeysOnly(Shadowed):
    """Chooses within a sparse first step, layer by layer, reading no values but the chosen ones."""

    name: ClassVar[str] = "keys-only"
    chooses: ClassVar = "layer"
    mean_query: bool = False
    """Score by the logit of the block-average query."""

    def observe(self, view: LayerView) -> Observed:
        """Scores of this layer's keys."""
        if self.mean_query:
            return Observed(mean_logit(view.rows, view.key, view.scaling))
        return super().observe(view)


def seen_in_fp8(view: LayerView, scaled: Scaled) -> LayerView:
    """The view with its keys rounded to e4m3: one scale for each channel of a head, or for each head."""
    key = view.key.float().masked_fill(~view.is_visible[:, None, :, None], 0.0)
    largest = key.abs().amax(dim=2 if scaled == "channel" else (2, 3), keepdim=True)
    scale = largest.clamp_min(1e-12) / torch.finfo(FP8).max
    return replace(view, key=((key / scale).to(FP8).float() * scale).to(view.key.dtype))


@dataclass(frozen=True)
class Arm:
    """A rule at some budgets, which share its passes."""

    label: str
    rule: Callable[..., Rule]
    dense_layers: int
    budgets: Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rules(self) -> list[Rule]:
        """One for each budget."""
        return [self.rule(budget=k, dense_layers=self.dense_layers, **self.options) for k in self.budgets]


def arms_of(budgets: Sequence[int], large: Sequence[int]) -> list[Arm]:
    """Everything that is compared; mage, at the large budgets too, comes first for either number of dense layers."""
    some = sorted({*budgets, *large})
    mean = {"mean_query": True}
    return [
        Arm("mage", Mage, 2, some),
        Arm("mage", Mage, 0, some),
        Arm("mage, fp8 by channel", Shadowed, 0, budgets, {"scaled": "channel"}),
        Arm("mage, fp8 by head", Shadowed, 0, budgets, {"scaled": "head"}),
        Arm("keys-only", KeysOnly, 0, budgets),
        Arm("keys-only", KeysOnly, 2, budgets),
        Arm("keys-only, fp8 by channel", KeysOnly, 0, budgets, {"scaled": "channel"}),
        Arm("keys-only, fp8 by channel", KeysOnly, 2, budgets, {"scaled": "channel"}),
        Arm("keys-only, mean query", KeysOnly, 0, budgets, mean),
        Arm("keys-only, mean query", KeysOnly, 2, budgets, mean),
    ]


@dataclass(frozen=True)
class Probed:
    """One row of the result on one window."""

    ce: float
    first_ce: float
    recall: float


Key = tuple[str, int, int]
"""Label, dense layers, budget."""


def choose_from_exact(window: Window, rules: Sequence[Rule]) -> tuple[list[Selection], list[float]]:
    """Every rule's keys from the exact all-[MASK] step, and that step's cross-entropy for each."""
    seen = look(window, window.start, rules)
    chosen = [rule.choose(seen.observed[rule], window.lengths) for rule in rules]
    return chosen, first_losses(window, seen.hidden) * len(rules)


def choose_while_sparse(window: Window, rules: Sequence[Rule]) -> tuple[list[Selection], list[float]]:
    """The same for rules that choose inside a sparse all-[MASK] step."""
    times, stacked = len(rules), StackedRule(rules)
    start = window.start.repeat(times, 1)
    hidden = block_forward(window.lm.model, window.prefix(1, times), start, rule=stacked)
    layers = range(stacked.dense_layers, len(window.cache.keys))
    chosen = []
    for i in range(times):
        index, is_kept = zip(*(stacked.chosen[layer][i] for layer in layers), strict=True)
        chosen.append(Selection(torch.stack(index), torch.stack(is_kept), first_layer=stacked.dense_layers))
    return chosen, first_losses(window, hidden, times)


def first_losses(window: Window, hidden: Tensor, times: int = 1) -> list[float]:
    """Mean cross-entropy at the all-[MASK] step of each of `times` stacks; hidden: (times * blocks, B, H)."""
    blocks = len(window.lengths)
    assert window.lm.family.mask_id is not None
    is_masked = window.start.eq(window.lm.family.mask_id)
    losses = [
        masked_cross_entropy(
            window.lm,
            hidden[block::blocks],
            window.before[block : block + 1],
            is_masked[block : block + 1].expand(times, -1),
            window.truth[block],
        )
        for block in range(blocks)
    ]
    return torch.stack(losses, dim=1).mean(-1).tolist()


@torch.no_grad()
def probe_window(window: Window, arms: Sequence[Arm]) -> tuple[float, float, dict[Key, Probed]]:
    """(exact cross-entropy at later steps, at the first step, every arm at every budget)."""
    model, blocks = window.lm.model, len(window.lengths)
    exact = window.losses(block_forward(model, window.prefix(len(REVEALS)), window.later))[0]
    first_exact = first_losses(window, block_forward(model, window.prefix(), window.start))[0]
    own: dict[tuple[int, int], Selection] = {}
    found: dict[Key, Probed] = {}
    for arm in arms:
        rules = arm.rules
        choose = choose_while_sparse if rules[0].chooses == "layer" else choose_from_exact
        chosen, first = choose(window, rules)
        if arm.rule is Mage:
            own |= {(arm.dense_layers, k): keys for k, keys in zip(arm.budgets, chosen, strict=True)}
        rows = [block for block in range(blocks) for _ in REVEALS]
        selection, _ = stack([Choice(keys, None, []).take(rows) for keys in chosen])
        times = len(rules)
        prefix, ids = window.prefix(len(REVEALS), times), window.later.repeat(times, 1)
        later = window.losses(block_forward(model, prefix, ids, selection=selection), times)
        for k, keys, ce, first_ce in zip(arm.budgets, chosen, later, first, strict=True):
            recall = float(keys.recall(own[arm.dense_layers, k]).mean())
            found[arm.label, arm.dense_layers, k] = Probed(ce, first_ce, recall)
    return exact, first_exact, found


# The fused commit


@dataclass
class FusedAttention:
    """Attention of [finished block ; next block's start] behind a prefix: the second half sees all, the first itself.

    The finished block's keys and values are written to the cache, as a commit does.
    """

    prefix: Prefix
    size: int
    observe: Callable[[LayerView], Observed]
    observed: list[Observed] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(1, heads, 2 B, D) -> (1, query heads, 2 B, D)."""
        size, length, cache = self.size, self.prefix.longest, self.prefix.cache
        row = self.prefix.rows[0]
        cache.keys[layer, row, :, length : length + size] = key[0, :, :size]
        cache.values[layer, row, :, length : length + size] = value[0, :, :size]
        past_key, past_value = self.prefix.read(layer)
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        known = key[:, :, : length + size]
        rows = packed_rows(query[:, :, size:], key.shape[1], size).squeeze(2)
        visible = torch.ones(1, length + size, dtype=torch.bool, device=key.device)
        self.observed.append(self.observe(LayerView(layer, rows, known, visible, (length + size,), scaling)))
        mask = torch.ones(2 * size, length + 2 * size, dtype=torch.bool, device=key.device)
        mask[:size, length + size :] = False
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


@torch.no_grad()
def fused_commit(
    model: nn.Module, cache: PrefixCache, finished: Tensor, start: Tensor, rule: Rule
) -> tuple[Tensor, list[Observed]]:
    """Commit a finished block and run the next block's first step, exactly, in one forward.

    Args:
        cache: of one row, with room for the block, which it holds afterwards.
        finished, start: (1, B) int64.

    Returns:
        (1, 2 B, hidden) of both blocks, and what the rule saw of the first step in every layer.
    """
    prefix, size = cache.prefix(), finished.shape[1]
    attention = FusedAttention(prefix, size, rule.observe)
    ids = torch.cat([finished, start], dim=1)
    hidden = hidden_states(model, ids, prefix.positions(2 * size), attention.attend)
    cache.ids[0].extend(finished[0].tolist())
    return hidden, attention.observed


@torch.no_grad()
def compare_fused(model: nn.Module, tokens: Sequence[int], start: Tensor, rule: Rule) -> dict[str, float]:
    """How far the fused form is from commit and first step one after the other, on one row.

    Args:
        tokens: whole blocks; the last of them is the finished one.
        start: (1, B) int64, the next block's first step.
    """
    size = start.shape[1]
    before, finished = list(tokens[:-size]), torch.tensor([tokens[-size:]], device=start.device)
    apart, fused = (PrefixCache.for_model(model, 1, len(tokens)) for _ in range(2))
    for cache in (apart, fused):
        extend(model, cache, [before], size)
    last, _ = extend(model, apart, [finished[0].tolist()], size)
    hidden, observed = observe_forward(model, apart, start, rule.observe)
    both, observed_fused = fused_commit(model, fused, finished, start, rule)
    n = len(tokens)
    chosen, chosen_fused = (rule.choose(seen, [n]) for seen in (observed, observed_fused))
    pairs = {
        "hidden": (hidden, both[:, size:]),
        "last_hidden": (last, both[:, size - 1]),
        "keys": (apart.keys[..., :n, :], fused.keys[..., :n, :]),
        "values": (apart.values[..., :n, :], fused.values[..., :n, :]),
    }
    far = {name: float((one - other).abs().max() / one.abs().max()) for name, (one, other) in pairs.items()}
    return far | {"keys_chosen_alike": float(chosen.recall(chosen_fused).mean())}


# Everything


def summarise(measured: Sequence[tuple[float, float, dict[Key, Probed]]], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One row for exact attention, then one for each arm and budget."""
    exact, first = np.array([m[0] for m in measured]), np.array([m[1] for m in measured])
    rows: list[dict[str, Any]] = [
        {"label": "exact", "ce": asdict(estimate(exact)), "first_ce": asdict(estimate(first))}
    ]

    def ce(key: Key) -> np.ndarray:
        return np.array([m[2][key].ce for m in measured])

    for arm in arms:
        for k, rule in zip(arm.budgets, arm.rules, strict=True):
            key = (arm.label, arm.dense_layers, k)
            row = {"label": arm.label, "dense_layers": arm.dense_layers, "budget": k, "options": rule.settings()}
            row["ce_gap"] = asdict(paired_difference(ce(key), exact))
            first_gap = paired_difference([m[2][key].first_ce for m in measured], first)
            row["first_ce_gap"] = asdict(first_gap) if rule.chooses == "layer" else None
            row["recall"] = asdict(estimate([m[2][key].recall for m in measured]))
            if arm.rule is Mage:
                against = {b: asdict(paired_difference(ce(key), ce(("mage", 2, b)))) for b in arm.budgets}
                row["against_dense"] = against if arm.dense_layers == 0 else None
            else:
                row["against_mage"] = asdict(paired_difference(ce(key), ce(("mage", arm.dense_layers, k))))
            rows.append(row)
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table."""

    def shown_estimate(found: Mapping[str, float] | None) -> str:
        return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]" if found else "-"

    print(f"{'arm':28} {'dense':>5} {'k':>5}  {'gap':28} {'minus mage':28} {'first step':28} recall")
    for row in rows[1:]:
        figures = " ".join(f"{shown_estimate(row.get(name)):28}" for name in ("ce_gap", "against_mage", "first_ce_gap"))
        print(f"{row['label']:28} {row['dense_layers']:5} {row['budget']:5}  {figures} {row['recall']['mean']:.3f}")


def interval(found: Mapping[str, float] | None) -> str:
    """`+0.012 (+0.010 to +0.014)`."""
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})" if found else "-"


def quality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every arm and budget, in Markdown."""
    lines = ["| | dense layers | k | CE gap | minus mage's | first step | mage's keys |", "|---" * 7 + "|"]
    for row in rows[1:]:
        gaps = [interval(row.get(name)) for name in ("ce_gap", "against_mage", "first_ce_gap")]
        cells = [row["label"], row["dense_layers"], row["budget"], *gaps, f"{row['recall']['mean']:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def budget_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mage without dense layers minus mage with two, budget against budget, in Markdown."""
    large = [row for row in rows if row.get("against_dense")]
    dense = list(large[0]["against_dense"])
    lines = [f"| 0 dense layers, k | {' | '.join(f'minus 2 dense, k = {k}' for k in dense)} |"]
    lines.append("|---" * (1 + len(dense)) + "|")
    for row in large:
        lines.append(f"| {row['budget']} | {' | '.join(interval(row['against_dense'][k]) for k in dense)} |")
    return "\n".join(lines)


def speed_tables(rows: Sequence[Mapping[str, Any]], blocks: Mapping[tuple[str, int], float]) -> str:
    """What was measured for one layer, and what follows from it per block, in Markdown.

    Args:
        rows: of scripts/bench_further.py; a case that failed has no figures.
        blocks: (model, batch) -> ms of mage's whole block, to set the savings beside.
    """
    rows = [row for row in rows if "layer_ms" in row]
    head = [f"{row['shape']} b={row['batch']}" for row in rows]
    tables = []
    for title, name in (("one layer, ms", "layer_ms"), ("saved per block, ms", "saved_ms_per_block")):
        lines = [f"| {title} | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
        for what in dict.fromkeys(what for row in rows for what in row[name]):
            cells = []
            for row in rows:
                ms, block = row[name].get(what), blocks.get((row["shape"], row["batch"]))
                share = f" ({ms / block:+.1%})" if ms is not None and block and name != "layer_ms" else ""
                cells.append("-" if ms is None else f"{ms:.4f}" if name == "layer_ms" else f"{ms:+.2f}{share}")
            lines.append(f"| {what} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def tables(path: Path) -> str:
    """All tables of a result; shares are of mage's block in decode_h100.json beside it, where that is."""
    result, decoded, blocks = json.loads(path.read_text()), path.with_name("decode_h100.json"), {}
    if decoded.is_file():
        for row in json.loads(decoded.read_text())["rows"]:
            is_meant = (row["rule"], row["dense_layers"], row["budget"], row["steps"]) == ("mage", 0, 512, 32)
            if is_meant and row["context"] == 131072 and row["graph"]:
                blocks[row["model"], row["batch"]] = row["block_ms"]
    parts = [quality_table(result["rows"]), budget_table(result["rows"])] if "rows" in result else []
    if "speed" in result:
        parts.append(speed_tables(result["speed"]["rows"], blocks))
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> None:
    """Measure window after window until all are done or the time is over, writing what there is after each."""
    lm = load(arguments.model, dtype="float32", device=arguments.device)
    tokens = load_ids(arguments.text, lm.tokenizer, lm.family)
    windows = cut_windows(tokens, arguments.context, arguments.windows)
    arms = arms_of(arguments.budgets, arguments.large)
    begin, last = time.perf_counter(), 0.0
    done: list[int] = []
    measured: list[tuple[float, float, dict[Key, Probed]]] = []
    result: dict[str, Any] = {
        "settings": {
            "model": shown(arguments.model),
            "text": shown(arguments.text),
            "text_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            "dtype": str(lm.dtype),
            "seed": SEED,
            "reveals": REVEALS,
            "context": arguments.context,
            "blocks": arguments.blocks,
            "windows": done,
        },
        "environment": environment() | ({"commit": arguments.commit} if arguments.commit else {}),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "definitions": DEFINITIONS,
        "predictions": PREDICTIONS,
    }
    assert lm.family.mask_id is not None
    start = torch.full((1, lm.family.block_size), lm.family.mask_id, device=lm.device)
    result["fused_commit"] = compare_fused(lm.model, windows[0].tolist(), start, Mage(budget=128, dense_layers=0))
    print("fused commit:", result["fused_commit"], flush=True)
    for number in np.random.default_rng(SEED).permutation(len(windows)).tolist():
        now = time.perf_counter()
        if measured and now - begin + last > arguments.seconds:
            break
        window = open_window(lm, windows[number], number, arguments.blocks, SEED)
        measured.append(probe_window(window, arms))
        done.append(number)
        last = time.perf_counter() - now
        if len(measured) % 8 == 1:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(arguments.out, json.dumps(result | {"rows": summarise(measured, arms)}, indent=1) + "\n")
            print(f"{len(measured)} windows, {last:.2f} s each", flush=True)
    result |= {"rows": summarise(measured, arms)}
    write_whole(arguments.out, json.dumps(result, indent=1) + "\n")
    show(result["rows"])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder or Hub id")
    parser.add_argument("text", nargs="?", help="held-out text or its token ids (.npy)")
    parser.add_argument("out", nargs="?", type=Path, help="JSON file to write, in results/")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the Markdown tables of a result")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for measuring, loading not counted")
    parser.add_argument("--windows", type=int, default=96, help="windows to probe at most")
    parser.add_argument("--blocks", type=int, default=8, help="blocks probed per window")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 512], help="keys per KV head")
    parser.add_argument("--large", type=int, nargs="+", default=[256, 1024], help="more budgets for mage alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="the toolkit's commit, where the run is made on a copy without its history")
    arguments = parser.parse_args(argv)
    if arguments.table is None and arguments.out is None:
        parser.error("give MODEL, TEXT and OUT, or --table JSON")
    try:
        if arguments.table is not None:
            print(tables(arguments.table))
        else:
            run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
