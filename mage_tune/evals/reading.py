"""Decoding for tasks: one prompt under one arm, its prompt read once for all arms of a model.

A kept cache always goes through the same forwards (the whole blocks of the prompt, then one block at a time), whether
it was just read or left by another arm, and never grows. So what an arm writes is the same to the bit in a run that was
interrupted and taken up again, where its prompts are read anew.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mage_tune.backbone import causal_lm
from mage_tune.data.text import load_ids
from mage_tune.decode.attention import extend
from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.result import Generation
from mage_tune.evals.tasks import Arm
from mage_tune.lm import BlockDiffusionLM

LIMIT_BYTES = 2 << 30
"""Keys and values kept for later arms."""


@dataclass(frozen=True)
class Decoding:
    """How a task's prompts are continued: greedily, until every token is sure or in a fixed number of steps."""

    max_new_tokens: int
    threshold: float
    """Confidence above which a token is accepted."""
    steps: int | None = None
    """Denoising steps per block, the surest tokens first, whatever their confidence; None goes by the threshold."""
    stops: bool = True
    """Whether a stop token ends the text."""

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `lm.generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "threshold": self.threshold}
        if self.steps is not None:
            options |= {"acceptance": "static", "steps": self.steps}
        return options if self.stops else options | {"stop_ids": ()}

    def settings(self) -> dict[str, Any]:
        """Everything, for results."""
        return asdict(self)


class Reader:
    """Continues prompts; holds what it read of them for the next arm, as far as that fits in `limit` bytes.

    The first prompts that fit are kept rather than the last: every arm goes through all of them in the same order.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self.limit, self.used = limit, 0
        self.caches: dict[tuple[str, str], PrefixCache] = {}

    def answer(self, lm: BlockDiffusionLM, ids: np.ndarray, arm: Arm, decoding: Decoding) -> tuple[Generation, float]:
        """Continue one prompt under an arm.

        Args:
            ids: (n,) token ids.

        Returns:
            The generation and the seconds it took, without the reading of the prompt.
        """
        cache = self.read(lm, ids, arm, decoding.max_new_tokens)
        start = time.perf_counter()
        out = lm.generate(ids.tolist(), cache=cache, **decoding.options(), **arm.generate_options())
        return out, time.perf_counter() - start

    @torch.no_grad()
    def read(self, lm: BlockDiffusionLM, ids: np.ndarray, arm: Arm, room: int) -> PrefixCache:
        """The cache of a prompt's whole blocks, with room for as many new tokens."""
        key = arm.model, hashlib.sha256(np.ascontiguousarray(ids, dtype=np.int64).tobytes()).hexdigest()
        if key in self.caches:
            return self.caches[key]
        size = lm.family.block_size
        capacity = (len(ids) + room) // size * size + 2 * size
        cache = PrefixCache.for_model(lm.model, 1, capacity)
        whole = (len(ids) - 1) // size * size  # the last token's forward says what comes next: left to `generate`
        lm.model.eval()
        extend(lm.model, cache, [ids[:whole].tolist()], size)
        needed = 2 * cache.keys.nbytes
        if self.used + needed <= self.limit:
            self.caches[key] = cache
            self.used += needed
        return cache

    def forget(self) -> None:
        """Let all of it go: the model changes, or the task is done."""
        self.caches.clear()
        self.used = 0


_TEXTS: WeakKeyDictionary[BlockDiffusionLM, dict[str, np.ndarray]] = WeakKeyDictionary()


def held_out_ids(lm: BlockDiffusionLM, path: str) -> np.ndarray:
    """The ids of a held-out text (see `data.text.load_ids`), read once per model."""
    texts = _TEXTS.setdefault(lm, {})
    if path not in texts:
        texts[path] = load_ids(path, lm.tokenizer, lm.family)
    return texts[path]


def longest_context(lm: BlockDiffusionLM) -> int:
    """Positions the model was made for."""
    return int(causal_lm(lm.model).config.max_position_embeddings)


def check_context(lm: BlockDiffusionLM, key: str, length: int, *, new: int = 0, whole_blocks: bool = False) -> None:
    """Refuse a context that the model cannot have.

    Raises:
        ValueError: `length` (plus `new` tokens to be written) exceeds the model's positions, or is no whole blocks.
    """
    size, longest = lm.family.block_size, longest_context(lm)
    if whole_blocks and (length % size or length < 2 * size):
        raise ValueError(f"{key} {length} is not two or more whole blocks of {size} tokens")
    if length + new > longest:
        written = f" (and {new} to be written)" if new else ""
        raise ValueError(f"{key} {length}{written} is longer than the model's {longest} positions")
