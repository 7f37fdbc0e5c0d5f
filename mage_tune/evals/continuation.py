"""Copying and going on: what a model writes after a passage that it has seen before, and after plain text.

    copy      a window whose last block repeats one from its middle; what came after that is to be written again
    continue  a window less its last block; nothing is right or wrong, but how many forwards a block takes says how
              sure the model goes on

Copying is what a sparse step loses first: every token written needs its own key, and no single needle does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from mage_tune.evals.needles import NeedlePrompt, digest, sparse_steps
from mage_tune.evals.reading import Decoding, Reader, check_context
from mage_tune.evals.tasks import FORWARDS, Advance, Arm, Defaults, Measure, SampleRecord, TaskResult, shortened
from mage_tune.evals.text_tasks import WindowTask
from mage_tune.lm import BlockDiffusionLM


@dataclass(frozen=True)
class CopyPrompt:
    """A text whose last block repeats an earlier one, and how it went on there."""

    input_ids: np.ndarray
    continuation: np.ndarray


def copy_prompt(window: np.ndarray, size: int, rng: np.random.Generator) -> CopyPrompt:
    """A window that ends in a block from its middle, for what came after that to be written again."""
    start = int(rng.integers(len(window) // 8, len(window) * 5 // 8))
    passage = window[start : start + 2 * size].astype(np.int64)
    return CopyPrompt(np.concatenate([window[: -2 * size].astype(np.int64), passage[:size]]), passage[size:])


class ContinuationTask(WindowTask):
    """Copy a passage seen before, or write the next block of plain text.

    Args:
        kind: "copy" or "continue".
        steps: denoising steps per block; None goes by the threshold.
    """

    kind: ClassVar[str] = "continuation"
    title: str

    def __init__(
        self,
        defaults: Defaults,
        what: Literal["copy", "continue"],
        *,
        name: str,
        context: int,
        documents: int,
        steps: int | None,
    ) -> None:
        super().__init__(
            defaults, name=name, context=context, documents=documents, blocks=1, budgets=[], dense_layers=0
        )
        self.what, self.steps, self.threshold = what, steps, defaults.threshold
        self.settings = {
            "kind": what,
            "context": context,
            "documents": documents,
            "steps": steps,
            "threshold": defaults.threshold,
            "seed": defaults.seed,
        }
        self.title = "Copying a passage seen before" if what == "copy" else "Going on with plain text"
        self.headline = "copied" if what == "copy" else "forwards"
        copied = Measure("tokens copied", True, "share of the passage's tokens written in their places", "passages")
        self.measures: Mapping[str, Measure] = ({"copied": copied} if what == "copy" else {}) | {
            "forwards": replace(FORWARDS, unit="passages")
        }
        self.prompts: list[CopyPrompt] = []
        self.reader = Reader()

    def prepare(self, lm: BlockDiffusionLM) -> str:
        """Cut the windows and lay out what is to be continued."""
        size = lm.family.block_size
        super().prepare(lm)
        check_context(lm, f"{self.name}: context", self.context, whole_blocks=True)
        if self.what == "copy":
            self.prompts = [
                copy_prompt(window, size, np.random.default_rng([self.seed, number]))
                for number, window in enumerate(self.windows)
            ]
        else:
            whole = [window.astype(np.int64) for window in self.windows]
            self.prompts = [CopyPrompt(window[:-size], window[-size:]) for window in whole]
        return digest([NeedlePrompt(p.input_ids, tuple(map(str, p.continuation.tolist()))) for p in self.prompts])

    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Continue every prompt by one block."""
        size = lm.family.block_size
        steps = None if self.steps is None else min(self.steps, size)
        decoding = Decoding(size, self.threshold, steps, stops=False)
        metrics: dict[str, list[Any]] = {name: [] for name in self.measures}
        records = []
        for number, prompt in enumerate(self.prompts):
            out, seconds = self.reader.answer(lm, prompt.input_ids, arm, decoding)
            pairs = zip(out.rows[0].tokens, prompt.continuation.tolist(), strict=False)
            copied = sum(written == token for written, token in pairs) / size
            if self.what == "copy":
                metrics["copied"].append(copied)
            metrics["forwards"].append(out.forwards_per_block)
            facts: dict[str, Any] = {"sparse_share": sparse_steps(out)}
            if self.what == "copy":
                facts |= {"copied": copied}
            if lm.tokenizer is not None:
                facts["expected"] = [shortened(lm.tokenizer.decode(prompt.continuation.tolist()))]
            text = shortened(out.rows[0].text)
            records.append(SampleRecord(f"window {number}", text, out.forwards_per_block, seconds, facts))
            advance()
        return TaskResult(metrics, records, decoding.settings())

    def release(self) -> None:
        """Forget what was read of the prompts."""
        self.reader.forget()
