"""What is shown of a run while it trains: text that the model writes, recall of its choice of keys, utilisation."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from mage_tune.evals.probes import probe_window
from mage_tune.lm import BlockDiffusionLM
from mage_tune.plan.estimate import CARDS, Estimate
from mage_tune.plan.shape import read_model
from mage_tune.recipe import Recipe

BLOCKS = 2
"""Blocks that are written, and blocks whose recall is measured."""
STEPS = 8
"""Denoising steps of a block that is written."""


class Samples(TrainerCallback):
    """Every `train.sample_every` steps, a continuation of a training row's first half, and recall on its second.

    Args:
        lm: the model in training.
        row: (n,) token ids of a row.
        recipe: budget and dense layers are its eval section's.
        console: where it is printed.
        measured: takes "recall" and the seconds that samples took, "sample_s", for the next log line.
    """

    def __init__(
        self, lm: BlockDiffusionLM, row: np.ndarray, recipe: Recipe, console: Console, measured: dict[str, float]
    ) -> None:
        size = lm.family.block_size
        self.lm, self.recipe, self.console, self.measured = lm, recipe, console, measured
        self.row = np.asarray(row[: len(row) // (2 * size) * 2 * size], dtype=np.int64)
        self.every = recipe.train.sample_every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so where the row is too short to be continued."""
        if self.every and not len(self.row):
            self.every = 0
            if state.is_world_process_zero:
                what = f"none, as row 0 is shorter than two blocks of {self.lm.family.block_size} tokens"
                self.console.print(f"warning: train.sample_every: {what}", style="yellow", soft_wrap=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On every process, as an engine may need all of them for a forward pass; one prints.

        Raises:
            ValueError: it failed where processes share weights: the others may wait for this one in a forward pass
                that it has left, so it must not go on to the next step.
        """
        if not self.every or state.global_step % self.every:
            return
        began = time.perf_counter()
        try:
            text = self.sample()
        except Exception as error:  # a run is worth more than its samples
            what = f"({type(error).__name__}: {error})"
            if splits_weights():
                raise ValueError(
                    f"train.sample_every: the sample after step {state.global_step} failed {what}, and processes that "
                    "share weights cannot go on apart; with train.sample_every=0 the same command goes on from the "
                    "last checkpoint"
                ) from error
            self.every = 0
            text = f"warning: train.sample_every: no more samples {what}; training goes on"
        self.measured["sample_s"] = self.measured.get("sample_s", 0.0) + time.perf_counter() - began
        if state.is_world_process_zero:
            self.console.print(f"step {state.global_step}: {text}", markup=False, style="cyan", soft_wrap=True)

    @torch.no_grad()
    def sample(self) -> str:
        """Recall and a continuation in one line; neither random state nor mode of the model changes."""
        was_training, settings = self.lm.model.training, self.recipe.eval
        half = len(self.row) // 2
        self.lm.model.eval()
        try:
            with torch.random.fork_rng(devices=[self.lm.device] if self.lm.device.type == "cuda" else []):
                budget = min(settings.budgets[0], half // 2)
                found = probe_window(
                    self.lm, self.row, 0, blocks=BLOCKS, budgets=[budget], dense_layers=settings.dense_layers, seed=0
                )
                size = self.lm.family.block_size
                # Steps and length are fixed: every process does as many forward passes, whatever rounding does.
                settled: dict[str, Any] = {"steps": min(STEPS, size), "acceptance": "static", "stop_ids": ()}
                out = self.lm.generate(self.row[:half].tolist(), max_new_tokens=BLOCKS * size, **settled)
        finally:
            self.lm.model.train(was_training)
        recall = self.measured["recall"] = float(np.mean([block.recall[0] for block in found]))
        return f"recall@{budget} {recall:.3f}; writes: {(out.text or str(out.tokens))!r}"


def splits_weights() -> bool:
    """Whether a forward pass needs every process: FSDP or DeepSpeed's ZeRO-3 is at work."""
    return AcceleratorState().distributed_type is DistributedType.FSDP or is_deepspeed_zero3_enabled()


def ideal_step_s(recipe: Recipe) -> float | None:
    """Seconds that a recipe's optimizer step would take one of this machine's GPUs at its data sheet's peak.

    None on a CPU, or a card that is not known.
    """
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    peak = next((card.tflops for key, card in CARDS.items() if key.replace("-", "") in name), None)
    return Estimate(recipe, *read_model(recipe)).model_flop() / (peak * 1e12) if peak else None
