"""What is timed: models, contexts, batches, rules, kernels; in such order that a run cut short has what matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mage_tune.bench.floor import Load
from mage_tune.decode.engine.engine import Engine
from mage_tune.decode.engine.generate import engine_settings
from mage_tune.decode.rules import Exact, Mage, Quest, Rule, SparseD, SparseDLLM, Tidal
from mage_tune.decode.settings import Settings
from mage_tune.families import Family

EXACT_KERNELS = ("ours", "flashinfer-auto", "flashinfer-fa2", "sdpa")

UNEVEN = (
    *(0.5, 0.5, 0.5, 2.0, 0.25, 1.0, 5.0, 0.75, 0.25, 0.25, 0.5, 0.25, 2.0, 1.5),
    *(0.25, 2.0, 3.0, 0.25, 2.0, 0.5, 0.25, 1.5, 1.5, 0.25, 0.25, 0.25, 0.5, 0.25),
)
"""Keys of 28 layers as shares of the budget, one layer on average: as measured on the converted SmolLM2 before tuning
(results/layer_budgets/base.json)."""


def uneven_mage(budget: int, dense_layers: int) -> Mage:
    """MAGE whose layers keep different numbers of keys, `budget` on average over its first 28 sparse layers."""
    layers = enumerate(UNEVEN, start=dense_layers)
    keys = tuple((layer, max(1, round(share * budget))) for layer, share in layers)
    return Mage(budget=budget, dense_layers=dense_layers, layer_budgets=keys)


@dataclass(frozen=True)
class RuleForm:
    """A selection rule as it is timed."""

    make: Callable[[int, int], Rule]
    """(budget, dense layers) -> the rule."""
    quest_form: str = "matrix"


RULES: dict[str, RuleForm] = {
    "exact": RuleForm(lambda budget, dense: Exact()),
    "mage": RuleForm(lambda budget, dense: Mage(budget=budget, dense_layers=dense)),
    "mage-uneven": RuleForm(uneven_mage),
    "quest": RuleForm(lambda budget, dense: Quest(budget=budget, dense_layers=dense), "rows"),
    "quest-gemm": RuleForm(lambda budget, dense: Quest(budget=budget, dense_layers=dense), "matrix"),
    "quest-mean": RuleForm(lambda budget, dense: Quest(budget=budget, dense_layers=dense), "mean"),
    "sparsed": RuleForm(lambda budget, dense: SparseD(skip=0.2, ratio=0.3, dense_layers=dense)),
    "sparsed-budget": RuleForm(lambda budget, dense: SparseD(skip=0.2, budget=budget, dense_layers=dense)),
    "tidal": RuleForm(lambda budget, dense: Tidal(budget=budget, dense_layers=dense)),
    "sparse-dllm": RuleForm(lambda budget, dense: SparseDLLM(budget=budget, dense_layers=dense)),
}
"""mage-uneven: what other numbers of keys in every layer cost, as many in all.
quest scores as published, row by row; quest-gemm by matrix products; quest-mean by the mean row (ours).
sparsed: 20 % of the steps dense, 30 % of the tiles kept; sparsed-budget keeps as many keys as the others."""

OWN_DENSE_LAYERS = {"quest": 2, "quest-gemm": 2, "quest-mean": 2, "tidal": 2}
"""Rules whose authors leave the first layers dense are timed so."""


def label(rule: str, exact_kernel: str, dense_layers: int, is_graph: bool, fuses: bool = False) -> str:
    """What tells cases of one model, context and batch apart, for people."""
    kernel = f" ({exact_kernel})" if rule == "exact" else ""
    dense = f", {dense_layers} dense" if dense_layers else ""
    return f"{rule}{kernel}{dense}" + (", fused commit" if fuses else "") + ("" if is_graph else ", eager")


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    model: str
    context: int
    batch: int
    steps: int | None
    """Denoising steps of a block; None: as many as a threshold of the family's default takes."""
    rule: str = "exact"
    exact_kernel: str = "ours"
    dense_layers: int = 0
    budget: int = 512
    is_graph: bool = True
    fuses: bool = False
    """Whether the commit of the block before is part of the first step, where the engine can do so."""

    @property
    def group(self) -> tuple[str, int, int]:
        """Cases that share weights and cache."""
        return self.model, self.batch, self.context

    @property
    def label(self) -> str:
        """For people."""
        return label(self.rule, self.exact_kernel, self.dense_layers, self.is_graph, self.fuses)

    def settings(self, family: Family) -> Settings:
        """How the engine is set up for it."""
        rule = RULES[self.rule].make(self.budget, self.dense_layers)
        acceptance = "threshold" if self.steps is None else "static"
        return engine_settings(family, rule, steps=self.steps, acceptance=acceptance, stop_ids=())  # type: ignore[arg-type]

    def sparse_load(self, engine: Engine) -> Load:
        """What a sparse step of it reads."""
        rule, layers = engine.rule, engine.weights.shape.num_layers
        kept = min(self.context, rule.num_pages(self.context) * rule.page)
        if isinstance(rule, Quest):
            return Load(rule.dense_layers, kept, self.context / rule.page)
        if isinstance(rule, Tidal):
            sources = {rule.source_layer(layer) for layer in range(rule.dense_layers, layers)}
            return Load(rule.dense_layers + len(sources), kept)
        return Load(rule.dense_layers, kept)


def all_cases(
    models: list[str], contexts: list[int], batches: list[int], steps: list[int], rules: list[str], budget: int
) -> list[Case]:
    """Every combination that says something, the most telling first.

    1. The longest context, most steps: every rule, every exact kernel; MAGE with a fused commit, with two dense layers
       and eagerly too.
    2. Fewer steps, and threshold decoding, there.
    3. The other contexts: exact and MAGE, most steps; then every rule.
    """
    corners = [(model, batch) for batch in _ends_first(batches) for model in models]
    longest, most = max(contexts), max(steps)
    first, second, third, fourth = [], [], [], []
    for model, batch in corners:
        at = (model, longest, batch)
        first += _variants(at, most, rules, budget)
        fewer = [count for count in steps if count != most]
        second += [case for count in [*fewer, None] for case in _pair(at, count, rules, budget)]
        for context in sorted(set(contexts) - {longest}, reverse=True):
            third += _pair((model, context, batch), most, rules, budget)
            fourth += _variants((model, context, batch), most, rules, budget)
    return list(dict.fromkeys(first + second + third + fourth))


def _pair(at: tuple[str, int, int], steps: int | None, rules: list[str], budget: int) -> list[Case]:
    cases = [Case(*at, steps, rule, budget=budget) for rule in ("exact", "mage") if rule in rules]
    return cases + [Case(*at, steps, "mage", budget=budget, fuses=True)] * ("mage" in rules)


def _variants(at: tuple[str, int, int], steps: int, rules: list[str], budget: int) -> list[Case]:
    cases = []
    for rule in rules:
        if rule == "exact":
            cases += [Case(*at, steps, rule, kernel, budget=budget) for kernel in EXACT_KERNELS]
            continue
        cases.append(Case(*at, steps, rule, dense_layers=OWN_DENSE_LAYERS.get(rule, 0), budget=budget))
        if rule == "mage":
            cases.append(Case(*at, steps, rule, budget=budget, fuses=True))
            cases.append(Case(*at, steps, rule, dense_layers=2, budget=budget))
            cases.append(Case(*at, steps, rule, budget=budget, is_graph=False))
    return cases


def _ends_first(values: list[int]) -> list[int]:
    """Smallest, largest, then what lies between."""
    ordered = sorted(set(values))
    return list(dict.fromkeys([ordered[0], ordered[-1], *ordered]))
