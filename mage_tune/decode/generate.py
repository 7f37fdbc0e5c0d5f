"""Write text block by block: prefill, then for each block its denoising steps and the commit.

    out = generate(lm, "Once upon a time", max_new_tokens=256, attention="mage", budget=512)
    out.text, out.tokens, out.forwards, out.settings

1. Whole blocks of the prompt are read block-causally into the cache; its tail opens the first block.
2. A block starts as the tail (or, in families that seed it, the greedy next token after the block before) and masks.
3. Each step peeks at the block, draws tokens for the masked positions of the current sub-block and accepts some.
4. The finished block is forwarded once more, clean, which writes its keys and values (families.md 1.4). The last block
   of a row needs no commit.

Rows of a batch walk the blocks together, each on its own grid of positions; a row that has finished its block, or its
text, leaves the batch. What a row writes does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.layer_budgets import rule_options as budget_options
from mage_tune.decode.prompts import check_prompts, read_prompts
from mage_tune.decode.result import Generation, Progress, RowResult
from mage_tune.decode.rules import Rule, make_rule
from mage_tune.decode.sampler import Acceptance, AcceptanceName, Sampling
from mage_tune.decode.settings import Settings, window_size
from mage_tune.decode.steps import Levers
from mage_tune.decode.writer import Row, Writer

if TYPE_CHECKING:
    from mage_tune.lm import BlockDiffusionLM

__all__ = ["Generation", "Progress", "RowResult", "generate"]


def generate(
    lm: BlockDiffusionLM,
    prompt: Any,
    *,
    max_new_tokens: int = 128,
    threshold: float | None = None,
    steps: int | None = None,
    attention: str | Rule = "exact",
    budget: int | None = None,
    dense_layers: int | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    rule_options: Mapping[str, Any] | None = None,
    layer_budgets: Mapping[int, int] | str | Path | None = None,
    refresh: Literal["draft", "union"] | None = None,
    reselect_at: int | Sequence[int] = (),
    residual: bool = False,
    sub_block: int | None = None,
    block_cache: bool = False,
    acceptance: AcceptanceName = "threshold",
    entropy_bound: float = 0.1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] | None = None,
    prefill_chunk: int = 512,
    cache: PrefixCache | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Generation:
    """Continue a prompt, or each prompt of a batch.

    Args:
        lm: the model, its tokenizer and its family.
        prompt: token ids (list or 1-D tensor), text, or chat messages (list of {"role", "content"}); a list of such
            prompts or a 2-D tensor is a batch.
        max_new_tokens: the most tokens written, the stop token included; need not be whole blocks.
        threshold: confidence above which a token is accepted; the family's by default.
        steps: denoising steps a block is spread over: at least block / steps tokens are accepted at each (exactly so
            with acceptance="static"); by default at least one.
        attention: a selection rule by name, or a `Rule`; "exact" sees every key at every step.
        budget, dense_layers, sinks, recent, rule_options: options of a rule given by name (`decode.rules`).
        layer_budgets: keys of each layer under "mage": layer -> keys, or a file of `mage-tune budgets`, which brings
            budget and dense_layers with it; with another `budget` its numbers are scaled.
        refresh, reselect_at, residual: see `decode.steps.Levers`.
        sub_block: tokens accepted left to right in groups of this size; the family's by default, block size for none.
        block_cache: inside a block recompute only the sub-block in work, once its first token is known (Fast-dLLM v2's
            option; faster and approximate; rules that choose at every step then see that sub-block's queries).
        acceptance: "threshold", "static" or "entropy" (with `entropy_bound`, nats); see `decode.sampler`.
        temperature, top_p, top_k: 0 temperature is greedy, and then top-p and top-k do not apply.
        seed: of the random draws; a row draws the same alone and in a batch. A sequence gives each row its own.
        stop_ids: tokens that end the text; the family's by default, empty for none.
        stop_strings: strings that end the text; need a tokenizer.
        prefill_chunk: prompt tokens per forward pass.
        cache: with a row for each prompt, kept between calls: whole blocks that it already holds are not read again.
        on_step: called for every row when a block is laid out and after each of its steps.

    Raises:
        ValueError: a prompt or option that cannot work, or a model that gives NaN; one line that says which and why.
    """
    family = lm.family
    prompts, is_batch = read_prompts(lm, prompt)
    options = {"budget": budget, "dense_layers": dense_layers, "sinks": sinks, "recent": recent, **(rule_options or {})}
    options |= budget_options(layer_budgets, attention, budget, dense_layers)
    settings = Settings(
        family=family,
        rule=make_rule(attention, **options),
        levers=Levers(
            refresh=refresh,
            reselect_at=(reselect_at,) if isinstance(reselect_at, int) else tuple(reselect_at),
            residual=residual,
        ),
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k),
        acceptance=Acceptance(
            name=acceptance,
            threshold=family.threshold if threshold is None else threshold,
            entropy_bound=entropy_bound,
        ),
        window=window_size(family, sub_block),
        block_cache=block_cache,
        steps=steps,
        max_new_tokens=max_new_tokens,
        stop_ids=frozenset(family.stop_ids if stop_ids is None else stop_ids),
        stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ()),
        prefill_chunk=prefill_chunk,
        seed=seed if isinstance(seed, int) else tuple(seed),
    )
    check_prompts(lm, prompts, settings)
    if cache is not None and len(cache.ids) != len(prompts):
        raise ValueError(f"the kept cache has {len(cache.ids)} rows for {len(prompts)} prompts; it needs one for each")
    rows = [Row(i, ids, len(ids) + max_new_tokens, settings.row_seed(i)) for i, ids in enumerate(prompts)]
    with torch.no_grad(), _evaluating(lm.model):
        Writer(lm, settings, rows, cache, on_step).run()
    return Generation([row.result(lm, settings) for row in rows], is_batch, settings.as_dict())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and on again if it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
