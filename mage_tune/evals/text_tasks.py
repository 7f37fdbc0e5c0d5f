"""Tasks on held-out text: how well the all-[MASK] step foresees later ones, by budget, by rule and by layer."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch

from mage_tune.backbone import causal_lm
from mage_tune.decode.attention import Selection, block_forward
from mage_tune.decode.rules import make_rule
from mage_tune.decode.steps import Choice
from mage_tune.evals.probes import REVEALS, probe_window
from mage_tune.evals.reading import LIMIT_BYTES, check_context, held_out_ids
from mage_tune.evals.tasks import Advance, Arm, Defaults, Measure, SampleRecord, Task, TaskResult
from mage_tune.evals.windows import Window, choose, look_everywhere, open_window, probe_arm, stack
from mage_tune.lm import BlockDiffusionLM
from mage_tune.recipe import RecipeError

ROWS = 48
"""Rows of a block that one forward of the layer view takes; bounds memory."""

TEXT = {
    "recall": Measure(
        "recall@{k}",
        True,
        "share of a later step's own top-k prefix keys that the all-[MASK] step had already chosen",
        "windows",
    ),
    "mass": Measure(
        "mass kept@{k}",
        True,
        "share of a later step's attention over the prefix that falls on the k keys chosen at the all-[MASK] step",
        "windows",
    ),
    "query_cosine": Measure(
        "query cosine",
        True,
        "cosine of the block-average queries of the all-[MASK] step and of a later step",
        "windows",
    ),
    "ce_exact": Measure(
        "CE exact",
        False,
        "cross-entropy of the still masked tokens, in nats per token, when every step sees the whole prefix",
        "windows",
    ),
    "ce_mask": Measure(
        "CE mask-{k}",
        False,
        "the same when later steps see only the k keys chosen at the all-[MASK] step",
        "windows",
    ),
    "ce_oracle": Measure(
        "CE oracle-{k}",
        False,
        "the same with k keys chosen at the very step that uses them: the best that this selection could do",
        "windows",
    ),
    "ce_gap": Measure(
        "CE gap@{k}",
        False,
        "CE mask-k less CE exact: what it costs to choose keys at the all-[MASK] step",
        "windows",
    ),
}
"""Text probes: metric up to its "@k" -> how it is shown, in that order."""


class WindowTask(Task):
    """Base of the tasks on windows of held-out text; a window is a sample.

    Args:
        name: unique in the suite.
        context: tokens of a window, whole blocks.
        documents: windows, spread evenly over the text.
        blocks: blocks probed per window, all in its second half.
        budgets: keys kept per KV head that are tried; each must leave something out.
        dense_layers: first layers that stay exact.
        tokens: ids of the held-out text, where they were read already.
    """

    def __init__(
        self,
        defaults: Defaults,
        *,
        name: str,
        context: int,
        documents: int,
        blocks: int,
        budgets: Sequence[int],
        dense_layers: int,
        tokens: np.ndarray | None = None,
    ) -> None:
        self.name, self.text, self.seed, self.samples = name, defaults.text, defaults.seed, documents
        self.context, self.blocks, self.budgets, self.dense_layers = context, blocks, sorted(set(budgets)), dense_layers
        self.tokens = tokens
        self.settings = {
            "context": context,
            "documents": documents,
            "blocks": blocks,
            "budgets": self.budgets,
            "dense_layers": dense_layers,
            "reveals": list(REVEALS),
            "seed": defaults.seed,
        }
        self.windows: list[np.ndarray] = []

    def prepare(self, lm: BlockDiffusionLM) -> str:
        """Cut the windows."""
        size, depth = lm.family.block_size, int(causal_lm(lm.model).config.num_hidden_layers)
        check_context(lm, f"{self.name}: context", self.context, whole_blocks=True)
        shortest = self.context // size // 2 * size  # the first probed block is the first of the second half
        if self.budgets and max(self.budgets) >= shortest:
            raise ValueError(
                f"{self.name}: a budget of {max(self.budgets)} keys is at least the shortest probed prefix "
                f"({shortest}); nothing would be sparse: raise the context or lower the budget"
            )
        if self.dense_layers >= depth:
            raise ValueError(
                f"{self.name}: dense_layers {self.dense_layers}: the model has {depth} layers; nothing would be sparse"
            )
        if self.tokens is None:
            if self.text is None:
                raise ValueError(f"{self.name}: held-out text is needed; give a file (--set text=PATH)")
            self.tokens = held_out_ids(lm, self.text)
        self.windows = cut_windows(self.tokens, self.context, self.samples)
        total = hashlib.sha256()
        for window in self.windows:
            total.update(np.asarray(window, dtype=np.int64).tobytes())
        return total.hexdigest()


class TextTask(WindowTask):
    """Recall, attention mass, query cosine and cross-entropies of MAGE's choice, at all budgets in one pass."""

    kind: ClassVar[str] = "text"
    title = "Held-out text"
    measures: Mapping[str, Measure] = TEXT

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.headline = f"recall@{self.budgets[-1]}"

    def key(self, metric: str, arm: Arm) -> str:
        """ "recall@64": budgets are in the metric, as all of them are tried at once."""
        return metric if self.name == "text" else f"{self.name}.{metric}"

    def takes(self, arm: Arm) -> bool:
        """Once per model: exact attention and every budget are in the same pass."""
        return arm.rule == "exact"

    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Probe every window."""
        names = ["ce_exact", "query_cosine"]
        names += [f"{m}@{k}" for k in self.budgets for m in ("recall", "mass", "ce_mask", "ce_oracle", "ce_gap")]
        metrics: dict[str, list[float]] = {name: [] for name in names}
        records = []
        for number, window in enumerate(self.windows):
            start = time.perf_counter()
            probed = probe_window(
                lm,
                window,
                number,
                blocks=self.blocks,
                budgets=self.budgets,
                dense_layers=self.dense_layers,
                seed=self.seed,
            )
            ce_exact = float(np.array([b.ce_exact for b in probed]).mean())
            metrics["ce_exact"].append(ce_exact)
            metrics["query_cosine"].append(float(np.array([b.query_cosine for b in probed]).mean()))
            for i, k in enumerate(self.budgets):
                for name in ("recall", "mass", "ce_mask", "ce_oracle"):
                    metrics[f"{name}@{k}"].append(float(np.array([getattr(b, name)[i] for b in probed]).mean()))
                metrics[f"ce_gap@{k}"].append(metrics[f"ce_mask@{k}"][-1] - ce_exact)
            facts = {"blocks": [asdict(block) for block in probed]}
            seconds = time.perf_counter() - start
            records.append(SampleRecord(f"window {number}", seconds=seconds, facts=facts))
            advance()
        return TaskResult(metrics, records)


class RulesTask(WindowTask):
    """Cross-entropy and recall of held-out text under any selection rule."""

    kind: ClassVar[str] = "rules"
    title = "Held-out text, rule by rule"
    headline = "ce"
    measures: Mapping[str, Measure] = {
        "ce": Measure(
            "CE", False, "cross-entropy of the still masked tokens under this rule, in nats per token", "windows"
        ),
        "recall": Measure(
            "recall",
            True,
            "share of the keys that this very step would choose (mean probability, top k) that the rule lets it see",
            "windows",
        ),
    }

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.opened: dict[int, Window] = {}
        self.used = 0

    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Probe every window under one rule."""
        rule = arm.attention()
        metrics: dict[str, list[float]] = {"ce": []}
        if rule.chooses != "never":
            metrics["recall"] = []
        records = []
        for number in range(len(self.windows)):
            start = time.perf_counter()
            window = self.open(lm, number)
            if rule.chooses == "never":
                with torch.no_grad():
                    hidden = block_forward(lm.model, window.prefix(len(REVEALS)), window.later)
                metrics["ce"].append(window.losses(hidden)[0])
            else:
                with torch.no_grad():
                    own = make_rule("oracle", budget=arm.budget, dense_layers=rule.dense_layers)
                    by = Arm("base", "oracle", arm.budget, dense_layers=rule.dense_layers)
                    looks = look_everywhere(window, {arm: [rule], by: [own]} if rule != own else {arm: [rule]})
                    keys = choose(window, by, own, looks).selection
                    found = probe_arm(window, arm, [rule], looks, [keys])[0]
                assert found.recall is not None
                metrics["ce"].append(found.ce)
                metrics["recall"].append(found.recall)
            records.append(SampleRecord(f"window {number}", seconds=time.perf_counter() - start))
            advance()
        return TaskResult(metrics, records)

    def open(self, lm: BlockDiffusionLM, number: int) -> Window:
        """A window behind its cached prefix, kept for the next rule while memory allows."""
        if number in self.opened:
            return self.opened[number]
        window = open_window(lm, self.windows[number], number, self.blocks, self.seed)
        needed = 2 * window.cache.keys.nbytes
        if self.used + needed <= LIMIT_BYTES:
            self.opened[number], self.used = window, self.used + needed
        return window

    def release(self) -> None:
        """Forget the windows' prefixes."""
        self.opened.clear()
        self.used = 0


class LayersTask(WindowTask):
    """Which layers the cost of an early choice comes from.

    Later steps see the keys chosen at the all-[MASK] step in every sparse layer but one, where they see those of the
    very step; what that wins in cross-entropy is that layer's share of the cost.
    """

    kind: ClassVar[str] = "layers"
    title = "Where the cost of an early choice comes from"
    headline = "foresight_cost"
    measures: Mapping[str, Measure] = {
        "foresight_cost": Measure(
            "cost of foresight",
            False,
            "CE with keys of the all-[MASK] step less CE with keys of the very step, in all layers",
            "windows",
        ),
        "sum_of_layers": Measure(
            "sum over layers",
            False,
            "what one layer's own choice wins, summed over layers: near the cost of foresight where layers add up",
            "windows",
        ),
    }

    @property
    def budget(self) -> int:
        """Keys kept per KV head."""
        return self.budgets[0]

    def takes(self, arm: Arm) -> bool:
        """Once per model: the rule is MAGE's."""
        return arm.rule == "exact"

    def key(self, metric: str, arm: Arm) -> str:
        """ "layers.foresight_cost@64"."""
        return f"{self.name}.{metric}@{self.budget}"

    @torch.no_grad()
    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Probe every window, layer by layer."""
        metrics: dict[str, list[float]] = {name: [] for name in self.measures}
        records = []
        foresight, own = (
            Arm(arm.model, name, self.budget, dense_layers=self.dense_layers) for name in ("mage", "oracle")
        )
        for number, tokens in enumerate(self.windows):
            start = time.perf_counter()
            window = open_window(lm, tokens, number, self.blocks, self.seed)
            rules = {one: one.attention() for one in (foresight, own)}
            looks = look_everywhere(window, {one: [rule] for one, rule in rules.items()})
            early, late = (choose(window, one, rule, looks).selection for one, rule in rules.items())
            layers = range(len(early.index))
            chosen = [early, late, *(_with_layer(early, late, layer) for layer in layers)]
            ce_early, ce_late, *ce_layers = cross_entropies(lm, window, chosen)
            gains = [ce_early - ce for ce in ce_layers]
            metrics["foresight_cost"].append(ce_early - ce_late)
            metrics["sum_of_layers"].append(float(np.sum(gains)))
            facts = {"gain_by_layer": gains, "first_layer": self.dense_layers}
            records.append(SampleRecord(f"window {number}", seconds=time.perf_counter() - start, facts=facts))
            advance()
        return TaskResult(metrics, records)


def cross_entropies(lm: BlockDiffusionLM, window: Window, chosen: Sequence[Selection]) -> list[float]:
    """Mean cross-entropy of a window's probed steps under each selection, several selections a forward."""
    found: list[float] = []
    per_forward = max(1, ROWS // len(window.later))
    for first in range(0, len(chosen), per_forward):
        part = chosen[first : first + per_forward]
        selection, _ = stack([Choice(one, None, []) for one in part])
        prefix, ids = window.prefix(len(REVEALS), len(part)), window.later.repeat(len(part), 1)
        found += window.losses(block_forward(lm.model, prefix, ids, selection=selection), len(part))
    return found


def _with_layer(early: Selection, late: Selection, layer: int) -> Selection:
    """The early selection with one layer's keys from the late one (both have the same slots)."""
    index, is_kept = early.index.clone(), early.is_kept.clone()
    index[layer], is_kept[layer] = late.index[layer], late.is_kept[layer]
    return Selection(index, is_kept, early.first_layer)


def cut_windows(tokens: np.ndarray, length: int, count: int) -> list[np.ndarray]:
    """`count` disjoint windows spread evenly over the held-out tokens.

    Raises:
        RecipeError: the text is too short for that many.
    """
    fitting = len(tokens) // length
    if fitting < count:
        raise RecipeError(
            f"eval.documents: the held-out text has {len(tokens)} tokens, enough for {fitting} windows of {length}; "
            f"{count} were asked for"
        )
    starts = np.linspace(0, fitting - 1, count).round().astype(int) * length
    return [tokens[start : start + length] for start in starts]
