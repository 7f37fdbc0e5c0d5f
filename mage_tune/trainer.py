"""Fine-tuning: one recipe in, one run folder out.

`MageTrainer` is transformers' Trainer with its loss replaced: one forward pass over the row's streams, and the weighted
sum of the objective's terms. Every term is a sum over its items divided by the items of the whole optimizer step, so
accumulation and several GPUs do not change the loss. Its checkpoints appear whole or not at all.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from mage_tune.backbone import Backbone, attach_adapter, causal_lm, load_backbone, output_head, random_backbone
from mage_tune.blocks import TILE
from mage_tune.data.collate import Collator, length_bucket
from mage_tune.data.mixture import Mixture, build_mixture, preview
from mage_tune.data.preview import beginning
from mage_tune.fused import Recompute, fuse, offloaded_checkpoint
from mage_tune.lm import BlockDiffusionLM
from mage_tune.progress import ProgressReporter, closing
from mage_tune.recipe import Recipe, Train
from mage_tune.run_folder import (
    STAGING,
    MetricsFile,
    kept,
    last_checkpoint,
    prepare_folder,
    publish_checkpoint,
    refuse_non_finite,
    save_adapter,
    saving,
    sweep,
    trained_weights,
    whole,
    write_facts,
)
from mage_tune.stability import NonFiniteError, SpikeGuard, StopOnSignal, TrainingStopped, ignore_stop_signals
from mage_tune.stream_loss import StreamLoss
from mage_tune.tracking import Tracking

DEEPSPEED = DistributedType.DEEPSPEED
WHOLE_ON_EVERY_PROCESS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
"""Engines that leave parameters as they are."""

LOSS_SPIKE, GRADIENT_SPIKE = 2.0, 10.0
"""Times the median of the last steps at which a loss or a gradient norm is warned about; gradients vary more."""

RECOMPUTED: dict[str, Recompute] = {"off": "nothing", "mlp": "mlp", "non_reentrant": "layer"}
"""What fused layers make again for each value of train.checkpointing."""


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


class OwnIntervals(TrainerCallback):
    """Has a run that goes on log and save as its recipe says now, not as the checkpoint's did."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has taken its state from the checkpoint by now."""
        state.compute_steps(args, state.max_steps)


class HoldHead(TrainerCallback):
    """Under DeepSpeed ZeRO-3, leaves the output head whole: the loss runs it outside the model's own forward."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine has taken over the weights by now."""
        for weight in output_head(kwargs["model"]).parameters():
            if hasattr(weight, "ds_id"):
                split: Any = weight
                split.ds_persist = split.is_external_param = True


class PrefetchLayers(TrainerCallback):
    """Under FSDP2, has the weights of a layer gathered while the one after it is in its backward pass.

    FSDP2 does so by itself, but forgets the order of the layers at the end of any backward pass, and the loss has one
    of its own, from the logits, inside the forward pass.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine has taken over the weights by now."""
        layers: Any = causal_lm(kwargs["model"]).model.layers
        for before, layer in pairwise(layers):
            if isinstance(layer, FSDPModule):
                layer.set_modules_to_backward_prefetch([before])


class SparedCollections(TrainerCallback):
    """After the first steps, has Python's garbage collector pass over what is there: modules, compiled code, data.

    A full collection of half a million objects takes as long as one or two steps of a small model, and the device
    waits for it.
    """

    WARM_UP = 2
    """Steps, in which most code is compiled."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is garbage now is collected before."""
        self.steps += 1
        if self.steps == self.WARM_UP:
            gc.collect()
            gc.freeze()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the process as it was."""
        gc.unfreeze()


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


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Stop LoRA layers from casting their inputs to the adapter's float32; autocast picks the precision.

    (peft.helpers.disable_input_dtype_casting does the same but fails on a model with trainable token rows.)
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


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


def train(
    recipe: Recipe,
    *,
    watch: Callable[[BlockDiffusionLM, Any, Recipe, Console, dict[str, float]], TrainerCallback] | None = None,
    ideal_step_s: float | None = None,
) -> Path:
    """Run a recipe and return the run folder, with the adapter at its top.

    Args:
        recipe: the recipe.
        watch: makes what looks at the model in training (`watch.Samples`), from it, a row's tokens, recipe, console and
            `MageTrainer.watched`.
        ideal_step_s: see `MageTrainer`.

    Raises:
        RecipeError: the folder holds a finished run, or an unfinished one of another recipe.
        ValueError: checkpoint, data or family facts do not fit.
        NonFiniteError: a loss, gradient or weight stopped being a number; the message names the step and its rows.
        TrainingStopped: Ctrl-C or SIGTERM ended it early, with a checkpoint to go on from.
    """
    folder = Path(recipe.output or f"runs/{recipe.name}")
    micro_steps_per_process(recipe.train)  # before anything is loaded
    checkpoint = prepare_folder(folder, recipe)
    take_own_gpu()
    backbone = load_recipe_backbone(recipe)
    loss = StreamLoss(recipe.objective)
    num_rows = recipe.train.steps * recipe.train.rows * recipe.train.accumulation
    console = Console(stderr=True)
    arguments = training_arguments(recipe, folder)
    dataset = build_mixture(recipe.data, backbone.tokenizer, backbone.family, num_rows, recipe.seed)
    if arguments.process_index == 0:
        write_facts(folder, recipe, backbone.family)
        if recipe.model.random_weights is not None:
            console.print(
                "RANDOM WEIGHTS: this run shows speed and memory; its adapter fits no model", style="bold yellow"
            )
        console.print(preview(next(iter(dataset)), backbone.tokenizer))
        if checkpoint is not None:
            console.print(f"going on from {checkpoint}", soft_wrap=True)
    model = build_adapter(backbone, recipe)
    trainer = build_trainer(recipe, folder, model, backbone, loss, dataset, arguments, console)
    check_engine(trainer.accelerator.distributed_type, arguments.world_size, checkpoint)
    trainer.ideal_step_s = ideal_step_s
    settings = recipe.train
    with StopOnSignal() as stop, ProgressReporter(console) as progress:
        trainer.add_callback(stop)
        trainer.add_callback(progress)
        trainer.add_callback(Tracking(settings.trackers, folder, recipe.name, recipe.model_dump(mode="json"), console))
        if settings.sample_every and watch is not None:
            lm = BlockDiffusionLM(model, backbone.tokenizer, backbone.family)
            trainer.add_callback(watch(lm, next(iter(dataset)).input_ids, recipe, console, trainer.watched))
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.signum is not None and trainer.state.global_step < recipe.train.steps:
        raise TrainingStopped(
            f"stopped by {signal.Signals(stop.signum).name} after step {trainer.state.global_step} of "
            f"{recipe.train.steps}; the same command goes on from {last_checkpoint(folder / 'checkpoints')}",
            stop.signum,
        )
    took = trainer.state.global_step - progress.first_step, time.perf_counter() - progress.started
    totals = trainer.totals()
    if trainer.is_world_process_zero():
        memory = "GPU memory" if torch.cuda.is_available() else "host memory"
        console.print(closing(*took, *totals, memory), highlight=False, soft_wrap=True)
    state = trained_weights(model)
    if trainer.is_world_process_zero():
        save_adapter(model, folder, state)
    trainer.accelerator.wait_for_everyone()
    return folder


def take_own_gpu() -> None:
    """Let "cuda" mean this process's GPU before anything is loaded, or all processes would load on the first one.

    accelerate chooses the same GPU, but with the training arguments, and those come after the model: once they are
    there, transformers would load it in ZeRO-3's way.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def load_recipe_backbone(recipe: Recipe) -> Backbone:
    """The model a recipe names, or random weights of its shape."""
    settings = recipe.model
    facts: dict[str, Any] = {
        "block_size": settings.block_size,
        "mask_id": settings.mask_id,
        "stop_ids": tuple(settings.stop_ids) if settings.stop_ids else None,
        "pad_id": settings.pad_id,
    }
    if settings.random_weights is not None:
        shape = settings.random_weights.model_dump()
        return random_backbone(
            shape,
            settings.family or "converted",
            seed=recipe.seed,
            dtype=settings.dtype,
            quantise=settings.quantise,
            **facts,
        )
    assert settings.path is not None
    backbone = load_backbone(
        settings.path,
        family=settings.family,
        revision=settings.revision,
        dtype=settings.dtype,
        quantise=settings.quantise,
        **facts,
    )
    if recipe.data.length % backbone.family.block_size:
        raise ValueError(
            f"data.length {recipe.data.length} is not a multiple of the block size {backbone.family.block_size}"
        )
    return backbone


def build_adapter(backbone: Backbone, recipe: Recipe) -> PeftModel:
    """The recipe's adapter on the backbone, from the recipe's seed, with its kernels and checkpointing.

    Raises:
        ValueError: fused kernels do not know the model, the adapter or the engine.
    """
    settings = recipe.train
    if settings.kernels == "plain" and settings.checkpointing != "off":
        enable_checkpointing(
            backbone.model, use_reentrant=settings.checkpointing == "reentrant", offload=settings.offload
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = attach_adapter(backbone, **recipe.adapter.model_dump())
    if settings.kernels == "fused":
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "train.kernels: fused layers read weights that ZeRO-3 keeps spread over the processes; write plain, or "
                "launch with fsdp2"
            )
        fuse(model, RECOMPUTED[settings.checkpointing], offload=settings.offload)
    return model


def enable_checkpointing(model: PreTrainedModel, *, use_reentrant: bool = False, offload: bool = False) -> None:
    """Recompute every decoder layer in the backward pass, from inputs held in host memory with `offload`."""
    # transformers renamed this within the range we support (5.23 warns about the old name).
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    if offload:
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = offloaded_checkpoint


def check_engine(engaged: DistributedType, processes: int, checkpoint: str | None) -> None:
    """Whether the engine that the launch asked for is at work, and can go on from the checkpoint.

    Raises:
        ValueError: accelerate has taken another one (on CPUs it knows DDP alone), or the checkpoint is another's.
    """
    for variable, kind in (("ACCELERATE_USE_FSDP", DistributedType.FSDP), ("ACCELERATE_USE_DEEPSPEED", DEEPSPEED)):
        if os.environ.get(variable, "").lower() == "true" and engaged != kind:
            raise ValueError(f"the launch asks for {kind.value}, which accelerate runs on GPUs only; use ddp")
    if checkpoint is None:
        return
    signs = {"optimizer.bin": DistributedType.FSDP, "latest": DEEPSPEED}
    wrote = next((kind for file, kind in signs.items() if (Path(checkpoint) / file).exists()), None)
    if wrote != (engaged if engaged in signs.values() else None):
        raise ValueError(
            f"{checkpoint}: written by {wrote.value if wrote else 'a single process or DDP'}, and this run is launched "
            f"with {engaged.value}; go on with the engine it was begun with"
        )
    writers = len(list(Path(checkpoint).glob("rng_state_*.pth")))
    if wrote == DEEPSPEED and writers != processes:
        raise ValueError(
            f"{checkpoint}: written by {writers} processes, and DeepSpeed goes on with as many only, not {processes}"
        )


def micro_steps_per_process(settings: Train, processes: int | None = None) -> int:
    """Micro-steps of one optimizer step that each process (of this launch) does: the same run on any number of them.

    Raises:
        ValueError: they cannot be shared out evenly.
    """
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if settings.accumulation % processes:
        enough = -(-settings.accumulation // processes) * processes
        raise ValueError(
            f"train.accumulation: {settings.accumulation} micro-steps cannot be shared evenly by {processes} "
            f"processes; use --set train.accumulation={enough} (and train.rows smaller, for the same rows per step)"
        )
    return settings.accumulation // processes


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The recipe in transformers' terms."""
    settings = recipe.train
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=micro_steps_per_process(settings),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        use_cpu=not on_gpu,  # else bfloat16 is refused on a machine without a GPU
        bf16=settings.precision == "bfloat16" or (settings.precision == "auto" and on_gpu),
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        dataloader_num_workers=recipe.data.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        average_tokens_across_devices=False,  # our own count of items is already over all processes
        accelerator_config={"dispatch_batches": False},  # a batch's tensors differ in length: it cannot be sliced
        ddp_find_unused_parameters=False,
    )
    # One process that sees several GPUs uses its own: the Trainer would split rows over all of them (DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def build_trainer(
    recipe: Recipe,
    folder: Path,
    model: PeftModel,
    backbone: Backbone,
    loss: StreamLoss,
    dataset: Dataset[Any],
    arguments: TrainingArguments,
    console: Console,
) -> MageTrainer:
    """Everything `train` needs, wired."""
    on_gpu = arguments.device.type == "cuda"
    collator = Collator(
        backbone.family,
        recipe.seed,
        length_multiple=length_bucket(recipe.data.length) if on_gpu else 1,
        pack_to=recipe.data.length if recipe.data.packing else None,
        document_multiple=TILE if on_gpu else 1,
        **loss.collator_needs(),
    )
    if arguments.bf16:
        leave_casts_to_autocast(model)
    trainer = MageTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=dataset,
        stream_loss=loss,
        schedule=recipe.train,
        sources=[f"{source.kind} {source.path}" for source in recipe.data.sources],
        tokenizer=backbone.tokenizer,
        console=console,
        callbacks=[
            MetricsFile(folder / "metrics.jsonl", recipe.model.random_weights is not None),
            OwnIntervals(),
            HoldHead(),
            PrefetchLayers(),
            SparedCollections(),
        ],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer
