"""`lm.generate` by the engine: the same prompts, settings and results, the blocks written by graphs and kernels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mage_tune.blocks import round_up
from mage_tune.decode.engine.engine import Engine
from mage_tune.decode.engine.weights import weights_of
from mage_tune.decode.layer_budgets import rule_options as budget_options
from mage_tune.decode.prompts import check_prompts, read_prompts
from mage_tune.decode.result import Generation
from mage_tune.decode.rules import Rule, make_rule
from mage_tune.decode.sampler import Acceptance, AcceptanceName, Sampling, cut_at_string
from mage_tune.decode.settings import Settings, window_size
from mage_tune.decode.steps import Levers
from mage_tune.decode.writer import Row
from mage_tune.families import Family

if TYPE_CHECKING:
    from mage_tune.lm import BlockDiffusionLM


def engine_settings(
    family: Family,
    rule: Rule,
    *,
    steps: int | None = None,
    acceptance: AcceptanceName = "threshold",
    threshold: float | None = None,
    sub_block: int | None = None,
    max_new_tokens: int = 128,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] | None = None,
    prefill_chunk: int = 512,
) -> Settings:
    """The settings of a generation that the engine can run: greedy, no levers (see `decode.generate.generate`)."""
    return Settings(
        family=family,
        rule=rule,
        levers=Levers(),
        sampling=Sampling(),
        acceptance=Acceptance(name=acceptance, threshold=family.threshold if threshold is None else threshold),
        window=window_size(family, sub_block),
        block_cache=False,
        steps=steps,
        max_new_tokens=max_new_tokens,
        stop_ids=frozenset(family.stop_ids if stop_ids is None else stop_ids),
        stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ()),
        prefill_chunk=prefill_chunk,
        seed=0,
    )


def generate(
    lm: BlockDiffusionLM,
    prompt: Any,
    *,
    attention: str | Rule = "exact",
    budget: int | None = None,
    dense_layers: int | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    rule_options: Mapping[str, Any] | None = None,
    layer_budgets: Mapping[int, int] | str | Path | None = None,
    exact_kernel: str = "ours",
    quest_form: str = "matrix",
    use_graphs: bool | None = None,
    **options: Any,
) -> Generation:
    """Continue a prompt, or each prompt of a batch, with the engine.

    Args:
        lm: the model, its tokenizer and its family. Its weights are copied, an adapter merged into the copy.
        prompt: as for `decode.generate.generate`.
        attention, budget, dense_layers, sinks, recent, rule_options, layer_budgets: the selection rule, as
            there.
        exact_kernel, quest_form, use_graphs: see `engine.Engine`.
        options: see `engine_settings`.

    Raises:
        ValueError: a prompt, option or model that the engine cannot serve.
    """
    unknown = options.keys() - inspect.signature(engine_settings).parameters.keys()
    if unknown:
        raise ValueError(f"the decode engine has no option {sorted(unknown)[0]!r}; the plain decoder may (fast=False)")
    prompts, is_batch = read_prompts(lm, prompt)
    of_rule: dict[str, Any] = {"budget": budget, "dense_layers": dense_layers, "sinks": sinks, "recent": recent}
    of_rule |= dict(rule_options or {}) | budget_options(layer_budgets, attention, budget, dense_layers)
    rule = make_rule(attention, **of_rule)
    settings = engine_settings(lm.family, rule, **options)
    check_prompts(lm, prompts, settings)
    rows = [Row(i, ids, len(ids) + settings.max_new_tokens, settings.row_seed(i)) for i, ids in enumerate(prompts)]
    capacity = round_up(max(row.limit for row in rows), lm.family.block_size)
    kernels = dict(exact_kernel=exact_kernel, quest_form=quest_form, use_graphs=use_graphs)
    engine = Engine(weights_of(lm.model), settings, len(rows), capacity, **kernels)  # type: ignore[arg-type]
    EngineWriter(lm, engine, settings, rows).run()
    return Generation([row.result(lm, settings) for row in rows], is_batch, settings.as_dict())


class EngineWriter:
    """The host side: lays out blocks, looks for the end of each row between blocks, commits.

    A row that has ended stays in the batch, its length frozen, until all have. A row's steps are counted until its
    block has no mask token left: where a text ends within a block, the plain decoder stops earlier and counts fewer.
    """

    def __init__(self, lm: BlockDiffusionLM, engine: Engine, settings: Settings, rows: list[Row]) -> None:
        capacity = round_up(max(row.limit for row in rows), engine.block_size)
        if len(rows) != engine.cache.batch:
            raise ValueError(f"an engine for a batch of {engine.cache.batch} cannot write {len(rows)} prompts")
        if capacity > engine.cache.capacity:
            raise ValueError(f"{capacity} tokens per row do not fit in an engine for {engine.cache.capacity}")
        self.lm, self.engine, self.settings, self.rows = lm, engine, settings, rows
        self.block_size, self.mask_id = engine.block_size, engine.blocks.mask_id

    def run(self) -> None:
        """Write every row to its end."""
        self._prefill()
        while [row for row in self.rows if row.finish is None]:
            going = self._lay_out()
            counts = self.engine.denoise(max(self.engine.most_steps(self._masked(row)) for row in going))
            self._settle(going, counts)
            self._end_at_strings(going)
            going = [row for row in going if row.finish is None]
            if going:
                self._commit(going)
                self._end_at_strings(going)  # a seed may have completed one

    def _prefill(self) -> None:
        engine, size = self.engine, self.block_size
        engine.cache.set_lengths([0] * len(self.rows))
        engine.is_deferred = False  # a commit of an earlier text, if that was cut short
        for row in self.rows:
            whole = row.tokens[: len(row.tokens) // size * size]
            if not whole:
                continue
            seed, passes = engine.prefill(row.index, whole)
            row.forwards["prefill"] += passes
            if len(whole) == len(row.tokens):
                self._open(row, seed)

    def _open(self, row: Row, seed: int) -> None:
        """Start the next block with its seed, in families that have one."""
        if self.settings.family.seed_token:
            row.start = len(row.tokens)
            row.tokens.append(seed)
            row.end_if_due(self.settings)

    def _lay_out(self) -> list[Row]:
        """Open a block in every row that goes on; the others get one without masks."""
        going = [row for row in self.rows if row.finish is None]
        for row in going:
            row.lay_out(self.block_size, self.mask_id)
        filler = [self.settings.family.pad_id or 0] * self.block_size
        ids = [row.block if row.finish is None else filler for row in self.rows]
        self.engine.blocks.lay_out(torch.tensor(ids))
        self.engine.set_active([row.finish is None for row in self.rows])
        return going

    def _masked(self, row: Row) -> list[int]:
        return [place for place, token in enumerate(row.block) if token == self.mask_id]

    def _settle(self, going: list[Row], counts: dict[str, int]) -> None:
        """Read the finished blocks back."""
        assert self.engine.blocks.are_done()
        blocks, taken = self.engine.blocks.ids.tolist(), self.engine.blocks.progress[:, 2].tolist()
        for row in going:
            row.block = blocks[row.index]
            row.settle(self.settings)
            rule, prefix = self.settings.rule, row.start
            sparse = max(0, taken[row.index] - counts["exact"]) if rule.is_sparse(prefix) else 0
            row.forwards["exact"] += taken[row.index] - sparse
            row.forwards["sparse"] += sparse
            row.sparse_blocks += sparse > 0
            row.keys_kept += sparse * self.engine.keys_kept(prefix)

    def _commit(self, going: list[Row]) -> None:
        self.engine.set_active([row.finish is None for row in self.rows])
        self.engine.commit(may_wait=True)
        seeds = self.engine.seed.tolist()
        for row in going:
            row.forwards["commit"] += 1
            self._open(row, seeds[row.index])

    def _end_at_strings(self, rows: list[Row]) -> None:
        """Cut the rows whose text holds a stop string after the token that completes it."""
        if not self.settings.stop_strings:
            return
        assert self.lm.tokenizer is not None
        for row in rows:
            end = cut_at_string(row.new_tokens, self.settings.stop_strings, self.lm.tokenizer.decode)
            if end is not None:
                row.tokens, row.finish = row.tokens[: len(row.prompt) + end], "stop_string"
