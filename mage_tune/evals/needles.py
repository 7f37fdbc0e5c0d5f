"""Needles in a haystack: does a model still find what it was asked for when later steps see only the chosen keys?

One prompt is a haystack of filler text with `needles` key-value sentences, then one chat turn that asks for `asked` of
them. An answer counts when every value asked for appears in it. One needle alone proves little (a single needle
survives k = 8); asking for several at once needs keys that the all-[MASK] step cannot single out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mage_tune.data.retrieval import Dialogue, draw_needles, filler_ids, make_haystack, question
from mage_tune.decode.cache import PrefixCache
from mage_tune.lm import BlockDiffusionLM

TASKS = {"single": 1, "multi": 3}
"""Task name -> needles asked for in one question."""


@dataclass(frozen=True)
class NeedlePrompt:
    """One question about one haystack."""

    input_ids: np.ndarray
    expected: tuple[str, ...]


@dataclass(frozen=True)
class NeedleResult:
    """One answer: the values asked for, whether all are in it, the share that is, its text and its cost."""

    expected: tuple[str, ...]
    is_right: bool
    share_found: float
    text: str
    forwards_per_block: float


def needle_prompts(
    lm: BlockDiffusionLM, text: np.ndarray, *, context: int, needles: int, asked: int, questions: int, seed: int
) -> list[NeedlePrompt]:
    """The same prompts for every arm: drawn from (seed, asked, question number) alone.

    Args:
        lm: its tokenizer's chat template words the question (a plain form without one); its weights are not used.
        text: (n,) token ids of held-out text to hide the needles in.
        context: tokens of the whole prompt.
        needles: sentences hidden in each haystack.
        asked: needles asked for in the one question.
        questions: prompts to make.
        seed: seed of everything drawn.
    """
    assert lm.tokenizer is not None
    filler, dialogue = filler_ids(text, lm.tokenizer, lm.family), Dialogue(lm.tokenizer, lm.family)
    prompts = []
    for number in range(questions):
        rng = np.random.default_rng([seed, asked, number])
        hidden = draw_needles(rng, needles)
        candidates = [n for n in hidden if len(n.values) == 1]
        wanted = [candidates[i] for i in rng.choice(len(candidates), size=asked, replace=False)]
        before, after = dialogue.prompt(question([n.key for n in wanted]))
        haystack, _ = make_haystack(rng, filler, lm.tokenizer, context - len(before) - len(after), hidden)
        prompts.append(NeedlePrompt(np.concatenate([before, haystack, after]), tuple(n.values[0] for n in wanted)))
    return prompts


def ask(
    lm: BlockDiffusionLM,
    prompt: NeedlePrompt,
    *,
    attention: str,
    budget: int,
    dense_layers: int,
    threshold: float,
    cache: PrefixCache | None = None,
) -> NeedleResult:
    """Answer one prompt greedily and score the answer; a kept `cache` lets several rules share reading the prompt."""
    options: dict[str, Any] = {} if attention == "exact" else {"budget": budget, "dense_layers": dense_layers}
    out = lm.generate(
        prompt.input_ids.tolist(),
        max_new_tokens=lm.family.block_size * (1 + len(prompt.expected)),
        attention=attention,
        threshold=threshold,
        cache=cache,
        **options,
    )
    found = [value in out.text for value in prompt.expected]
    return NeedleResult(prompt.expected, all(found), float(np.mean(found)), out.text, out.forwards_per_block)
