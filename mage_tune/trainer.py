"""MageTrainer: transformers' Trainer with its loss replaced.

One forward pass over the row's streams, and the weighted sum of the objective's terms. Every term is a sum over its
items divided by the items of the whole optimizer step, so accumulation and several GPUs do not change the loss. Its
checkpoints appear whole or not at all.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer

from mage_tune.backbone import causal_lm
from mage_tune.data.mixture import Mixture
from mage_tune.data.preview import beginning
from mage_tune.recipe import Train
from mage_tune.run_folder import (
    STAGING,
    kept,
    publish_checkpoint,
    refuse_non_finite,
    saving,
    sweep,
    trained_weights,
    whole,
)
from mage_tune.stability import NonFiniteError, SpikeGuard, ignore_stop_signals
from mage_tune.stream_loss import StreamLoss

DEEPSPEED = DistributedType.DEEPSPEED
WHOLE_ON_EVERY_PROCESS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
"""Engines that leave parameters as they are."""

LOSS_SPIKE, GRADIENT_SPIKE = 2.0, 10.0
"""Times the median of the last steps at which a loss or a gradient norm is warned about; gradients vary more."""


class MageTrainer(Trainer):
    """transformers' Trainer on stream rows; see the module's docstring.

    Args:
        stream_loss, schedule: the recipe's objective and optimisation.
        sources: a name of each source of the data set, for messages about rows.
        tokenizer: reads rows for such messages; None: the model has none.
        console: where warnings go.
    """

    ideal_step_s: float | None = None
    """Seconds of an optimizer step on one device at its peak, for utilisation."""

    def __init__(
        self,
        *,
        stream_loss: StreamLoss,
        schedule: Train,
        sources: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None,
        console: Console,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.stream_loss = stream_loss
        self.schedule = schedule
        self.sources = sources
        self.tokenizer = tokenizer
        self.console = console
        # Our loss is already divided by the items of the whole optimizer step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._saving_to: Path | None = None
        self._unread: list[tuple[list[int], list[str], Tensor]] = []
        """Of every micro-step since the last reading: its rows, and its terms by name and value."""
        self._step_rows: list[int] = []
        self._step_loss = 0.0
        self._guards = SpikeGuard("loss", LOSS_SPIKE), SpikeGuard("gradient norm", GRADIENT_SPIKE)
        self._logged: dict[str, float] = defaultdict(float)
        self._tokens = 0
        self._window = {"tokens": 0, "micro_steps": 0, "started": time.perf_counter()}
        self._trained: list[nn.Parameter] = []
        self.watched: dict[str, float] = {}
        """What `watch` measured since the last log line."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler | None:
        """The data set is the schedule: its order is fixed by the recipe's seed."""
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, with workers that outlive a signal to the whole process group."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        inner.worker_init_fn = ignore_stop_signals  # in place of a seed: all randomness is the collator's own
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """(terms,) float64: items of every term over all micro-steps and processes of this optimizer step."""
        self._step_rows, self._step_loss = [], 0.0
        if not batch_samples:
            return None
        items = torch.stack([self.stream_loss.items(batch) for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.reduce(items, reduction="sum") if self.accelerator.num_processes > 1 else items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's for what a recipe can ask, but that walks over the model's modules in every micro-step.

        With adapters there are thousands, and between two steps a GPU waits for the host.
        """
        if not self._trained:
            self._trained = [p for p in model.parameters() if p.requires_grad]
            if self.accelerator.distributed_type in WHOLE_ON_EVERY_PROCESS:
                clear_by_list(model, self._trained)
        if not (model.training and causal_lm(model).training):
            model.train()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        options = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DEEPSPEED else {}
        self.accelerator.backward(loss, **options)
        return loss.detach()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the Trainer's count knows no streams, and walks over the model for it; see `ideal_step_s`."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The Trainer's, with the trained parameters at hand."""
        if self.accelerator.distributed_type not in WHOLE_ON_EVERY_PROCESS:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Weighted sum of the objective's terms for one micro-step; what they are is read at the end of the step."""
        items = self.stream_loss.items(inputs) if num_items_in_batch is None else num_items_in_batch
        with self.accelerator.autocast():  # the output head runs outside the model's own forward
            sums = self.stream_loss.sums(model, inputs)
        device = inputs["input_ids"].device
        counts = items.to(device, torch.float32).clamp_min(1.0).unbind()
        values = {name: sums[name] / count for name, count in zip(self.stream_loss.weights, counts, strict=True)}
        if "sparse_share" in sums:
            values["sparse_share"] = sums["sparse_share"] / self.args.gradient_accumulation_steps
        self._unread.append((inputs["rows"], list(values), torch.stack([v.detach().float() for v in values.values()])))
        if self.accelerator.distributed_type == DEEPSPEED:  # its backward pass may be followed by the optimizer at once
            self._read_terms()
        loss = torch.zeros((), device=device)
        for name, weight in self.stream_loss.weights.items():
            loss = loss + weight * values[name]
        self._window["tokens"] += inputs["num_tokens"]
        self._tokens += inputs["num_tokens"]
        self._window["micro_steps"] += 1
        # Distributed engines average gradients over processes; the sums above are already over all of them.
        return loss * self.accelerator.num_processes

    def _read_terms(self) -> None:
        """Note what the terms of this optimizer step's micro-steps were.

        Not before their backward passes are under way: a GPU would have nothing to do while the host reads.

        Raises:
            NonFiniteError: a term is NaN or infinite.
        """
        unread, self._unread = self._unread, []
        for rows, names, values in unread:
            self._step_rows += rows
            for name, measured in zip(names, values.tolist(), strict=True):
                if not math.isfinite(measured):
                    raise self._not_finite(f"{name} is {measured}", rows)
                self._logged[name] += measured
                self._step_loss += self.stream_loss.weights.get(name, 0.0) * measured

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm of this step, before the optimizer sees the gradient.

        Raises:
            NonFiniteError: it or a term of the loss is NaN or infinite.
        """
        self._read_terms()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None:  # the engine clips, and tells later
            return None
        norm = whole(norm) if isinstance(norm, Tensor) else norm
        if not math.isfinite(norm):
            raise self._not_finite(f"the gradient norm is {float(norm)}", self._step_rows)
        (step_loss,) = self._over_processes([self._step_loss]).sum(0).tolist()
        for guard, value in zip(self._guards, (step_loss, float(norm)), strict=True):
            spike = guard.check(value)
            if spike and self.is_world_process_zero():
                advice = "if it does not come down again, lower train.learning_rate"
                self.console.print(f"warning: {self._about_step(spike, self._step_rows)}; {advice}", style="yellow")
        return norm

    def _over_processes(self, values: Sequence[float]) -> Tensor:
        """(processes, values) float64: the same measurements on every process; every process has to call it."""
        mine = torch.tensor([list(values)], dtype=torch.float64, device=self.args.device)
        return self.accelerator.gather(mine)

    def totals(self) -> tuple[float, float]:
        """Tokens of all processes, and the fullest one's peak of memory (GiB); every process has to call it."""
        measured = self._over_processes([self._tokens, peak_gib()])
        return measured[:, 0].sum().item(), measured[:, 1].max().item()

    def _about_step(self, what: str, rows: Sequence[int]) -> str:
        """`what`, with the step and the rows of this process that it came from."""
        chosen: Any = self.train_dataset
        named = [f"{row} ({self.sources[chosen.source[row]]}, {chosen.place(row)})" for row in rows[:8]]
        shown = ", ".join(named) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        return f"step {self.state.global_step + 1}: {what} on rows {shown}"

    def _not_finite(self, what: str, rows: Sequence[int]) -> NonFiniteError:
        """The error that ends a run: where it came from, what is left, and what to do."""
        shown, dataset = "", self.train_dataset
        if isinstance(dataset, Mixture):
            shown = f" (row {rows[0]} begins {beginning(dataset[rows[0]], self.tokenizer)!r})"
        return NonFiniteError(
            f"{self._about_step(what, rows)}; nothing of this step was saved, {kept(Path(str(self.args.output_dir)))}; "
            f"lower train.learning_rate, or look at the rows{shown}"
        )

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer makes checkpoint folders: aside, as long as one is being written."""
        return str(self._saving_to) if self._saving_to is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A whole checkpoint or none; see `run_folder.publish_checkpoint`.

        Raises:
            NonFiniteError: a weight is not finite.
            OSError: it could not be written, for example on a full disk; earlier ones are untouched.
        """
        refuse_non_finite(trained_weights(model))
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        if self.args.should_save:
            sweep(folder)
        self.accelerator.wait_for_everyone()
        self._saving_to = folder / STAGING
        try:
            with saving(f"step {step}: its checkpoint", folder, folder):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    publish_checkpoint(folder / STAGING / f"checkpoint-{step}", folder, self.schedule.keep_checkpoints)
        finally:
            self._saving_to = None
        self.accelerator.wait_for_everyone()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Linear warm-up, then the recipe's decay to `final_lr_share` of the peak."""
        if self.lr_scheduler is None:
            target = optimizer if optimizer is not None else self.optimizer
            assert target is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, learning_rate_share(self.schedule))
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add every term, throughput and memory, over all processes, to the Trainer's own log line."""
        if "loss" in logs:
            steps = self._window["micro_steps"] / self.args.gradient_accumulation_steps
            seconds = time.perf_counter() - self._window["started"] - self.watched.get("sample_s", 0.0)
            peak = peak_gib()
            names = sorted(self._logged)
            # Terms are each process's part of a sum over all; the share is a mean; memory is the fullest device's.
            measured = self._over_processes([*(self._logged[name] for name in names), self._window["tokens"], peak])
            *sums, tokens, _ = measured.sum(0).tolist()
            logs |= {name: value / steps for name, value in zip(names, sums, strict=True)}
            if "sparse_share" in logs:
                logs["sparse_share"] /= len(measured)
            logs["tokens_per_s"] = tokens / seconds
            logs["step_s"] = seconds / steps
            if self.ideal_step_s is not None:
                logs["mfu"] = self.ideal_step_s / logs["step_s"] / len(measured)
            if torch.cuda.is_available():
                logs["peak_gib"] = measured[:, -1].max().item()
            logs |= self.watched
            self.watched.clear()
            self._logged.clear()
            self._window = {"tokens": 0, "micro_steps": 0, "started": time.perf_counter()}
        super().log(logs, *args, **kwargs)


def clear_by_list(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Let `model.zero_grad()` forget the gradients of a list instead of looking for parameters in all modules."""

    def zero_grad(set_to_none: bool = True) -> None:
        for p in trained:
            p.grad = None

    model.zero_grad = zero_grad  # type: ignore[method-assign]


def peak_gib() -> float:
    """The most memory (GiB) that this process has had: of its GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def learning_rate_share(schedule: Train) -> Callable[[int], float]:
    """Step number -> share of the peak learning rate."""

    def share(step: int) -> float:
        if step < schedule.warmup_steps:
            return (step + 1) / (schedule.warmup_steps + 1)
        if schedule.schedule == "constant":
            return 1.0
        done = min((step - schedule.warmup_steps) / max(schedule.steps - schedule.warmup_steps, 1), 1.0)
        left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.schedule == "cosine" else 1 - done
        return schedule.final_lr_share + (1 - schedule.final_lr_share) * left

    return share
