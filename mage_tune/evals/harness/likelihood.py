"""Log-likelihood of a continuation under a block-diffusion model: left to right inside each block, exactly.

A block-diffusion model has no single next-token distribution; what it has is, for every block, a distribution of each
masked token given the clean prefix and whatever of the block is known. We chain those from left to right,

    log p(y | c) = sum_i log p(y_i | c, y_<i, [MASK] in the rest of the block that holds y_i),

which is the log-probability that the model's own decoder writes y when it fills each block one token at a time from
left to right at temperature 1. So it is deterministic, needs no draws of masks, and sums to one over continuations.

Cost: one row of block_size tokens per scored token (the context is read once and shared).
Bias: it is the likelihood of that one order. A model that fills blocks in order of confidence may do better in its own
order, and a mask-averaged bound (the training loss) is a different number, so only compare values of this estimator.
In families that seed a block with a real token, that token's term comes from the clean block before, as in decoding.
Under a selection rule, the states of a block that decoding would run sparsely see the keys that rule picks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mage_tune.backbone import output_head
from mage_tune.decode.attention import block_forward, extend
from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.rules import Rule
from mage_tune.decode.steps import choose_forward
from mage_tune.lm import BlockDiffusionLM

ROWS = 64
"""States of a block that are forwarded together."""


@dataclass(frozen=True)
class Score:
    """How probable a continuation is, and whether greedy decoding in the same order would write it."""

    log_probability: float
    """Nats."""
    is_greedy: bool


class ContinuationScorer:
    """Scores continuations one after the other; what neighbours share of the context is read once.

    Args:
        lm: the model; its adapter, if any, as it is switched now.
        rule: what the later states of a block see of the prefix.
        capacity: most tokens of context and continuation together.
    """

    def __init__(self, lm: BlockDiffusionLM, rule: Rule, capacity: int) -> None:
        assert lm.family.mask_id is not None
        self.lm, self.rule = lm, rule
        self.size, self.mask_id = lm.family.block_size, lm.family.mask_id
        self.head = output_head(lm.model)
        self.cache = PrefixCache.for_model(lm.model, 1, -(-capacity // self.size) * self.size)

    @torch.no_grad()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Score:
        """The continuation's score.

        Raises:
            ValueError: one of the two is empty, or holds the mask token.
        """
        tokens, size = [*context, *continuation], self.size
        if not context or not continuation:
            raise ValueError("a likelihood needs at least one token of context and one to score")
        if self.mask_id in tokens:
            raise ValueError(f"the text holds the mask token ({self.mask_id}), whose likelihood means nothing")
        total, is_greedy = 0.0, True
        first_block = len(context) // size * size
        needs_seed = self.lm.family.seed_token and first_block == len(context)
        # One token more than the whole blocks, unless the last of them has to be read again for what it predicts.
        self.cache.keep_common(0, tokens[: first_block if needs_seed else first_block + 1], size)
        for start in range(first_block, len(tokens), size):
            held = self.cache.lengths[0]
            hidden, _ = extend(self.lm.model, self.cache, [tokens[held:start]], size)
            begin = max(len(context), start)
            targets = tokens[begin : start + size]
            log_probability = self._block(start, tokens[start:begin], targets, hidden)
            chosen = log_probability.gather(-1, torch.tensor(targets, device=log_probability.device)[:, None])
            total += float(chosen.double().sum())
            is_greedy &= log_probability.argmax(-1).tolist() == targets
        return Score(total, is_greedy)

    def _block(self, start: int, known: list[int], targets: list[int], before: Tensor) -> Tensor:
        """(targets, vocab) log-probabilities of each target of one block; `before`: (1, hidden) ahead of the block."""
        seeded = self.lm.family.seed_token and not known
        first = [self._log_softmax(before)] if seeded else []
        states = [
            known + targets[:count] + [self.mask_id] * (self.size - len(known) - count)
            for count in range(int(seeded), len(targets))
        ]
        if not states:
            return first[0]
        hidden = self._states(start, torch.tensor(states, device=self.lm.device))
        places = torch.arange(len(states)) + len(known) + int(seeded) - int(self.lm.family.token_shift)
        rows = self._log_softmax(hidden[torch.arange(len(states)), places])
        return torch.cat([*first, rows])

    def _states(self, start: int, ids: Tensor) -> Tensor:
        """(states, B) -> (states, B, hidden): exact before the rule's choosing state, as decoding would be after it."""
        rule, exact = self.rule, len(ids)
        if rule.chooses == "once" and rule.is_sparse(start):
            exact = min(rule.select_at(self.size), len(ids))
        if rule.chooses != "once" and rule.is_sparse(start):
            exact = 0
        parts = [self._peek(start, part) for part in ids[:exact].split(ROWS)] if exact else []
        if exact == len(ids):
            return torch.cat(parts)
        if rule.chooses == "layer":
            parts += [self._peek(start, part, by_layer=True) for part in ids.split(ROWS)]
        elif rule.chooses == "step":
            for part in ids.split(ROWS):
                prefix = self.cache.prefix([0] * len(part), [start] * len(part))
                _, choice = choose_forward(self.lm.model, prefix, part, rule)
                parts.append(block_forward(self.lm.model, prefix, part, selection=choice.selection))
        else:
            prefix = self.cache.prefix([0], [start])
            hidden, choice = choose_forward(self.lm.model, prefix, ids[exact : exact + 1], rule)
            parts.append(hidden)
            for part in ids[exact + 1 :].split(ROWS) if exact + 1 < len(ids) else ():
                rows = self.cache.prefix([0] * len(part), [start] * len(part))
                selection = choice.selection.take([0] * len(part))
                parts.append(block_forward(self.lm.model, rows, part, selection=selection))
        return torch.cat(parts)

    def _peek(self, start: int, ids: Tensor, *, by_layer: bool = False) -> Tensor:
        prefix = self.cache.prefix([0] * len(ids), [start] * len(ids))
        return block_forward(self.lm.model, prefix, ids, rule=self.rule if by_layer else None)

    def _log_softmax(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocab) float32."""
        logits = self.head(hidden).float()
        if self.lm.family.name == "converted":
            logits[:, self.mask_id] = float("-inf")  # never a target in training (as in decode.writer)
        return logits.log_softmax(-1)
