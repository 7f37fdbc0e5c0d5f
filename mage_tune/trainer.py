"""Fine-tuning: one recipe in, one run folder out.

`MageTrainer` is transformers' Trainer with its loss replaced: one forward pass over the row's streams, and the weighted
sum of the objective's terms. Every term is a sum over its items divided by the items of the whole optimizer step, so
accumulation and several GPUs do not change the loss.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mage_tune.backbone import (
    Backbone,
    attach_adapter,
    causal_lm,
    hidden_states,
    load_backbone,
    output_head,
    random_backbone,
    write_family,
)
from mage_tune.blocks import TILE
from mage_tune.data.collate import Collator
from mage_tune.data.mixture import build_mixture, preview
from mage_tune.environment import environment
from mage_tune.objectives import (
    attention_alignment_sum,
    block_mean_queries,
    cross_entropy_sum,
    kl_sum,
    query_alignment_sum,
)
from mage_tune.progress import ProgressReporter
from mage_tune.recipe import Objective, Recipe, RecipeError, Train, resolved_yaml
from mage_tune.selection import mean_probability, prefix_visible
from mage_tune.streams import LayerView, Observer, RowStreams, StreamAttention

ADAPTER_FILE = "adapter_model.safetensors"
"""Its presence at the top of a run folder means the run has finished."""


class StreamLoss:
    """The objective on one batch: sums of every active term and how many items each is a sum over."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        terms = {
            "diffusion": objective.diffusion.weight,
            "query_alignment": objective.query_alignment.weight,
            "attention_alignment": objective.attention_alignment.weight,
            "sparse_distillation": objective.sparse_distillation.weight,
        }
        self.weights = {name: weight for name, weight in terms.items() if weight > 0}

    def collator_needs(self) -> dict[str, Any]:
        """Which streams the rows must carry (arguments of `Collator`)."""
        aligned = {"query_alignment", "attention_alignment"} & self.weights.keys()
        sparse = "sparse_distillation" in self.weights
        teacher_is_student = sparse and self.objective.sparse_distillation.teacher == "adapters_on"
        return {
            "exact_noisy": "diffusion" in self.weights or bool(aligned) or teacher_is_student,
            "mask_stream": sparse or bool(aligned),
            "sparse_stream": sparse,
            "sampled_blocks": self.objective.attention_alignment.blocks if "attention_alignment" in aligned else 0,
        }

    def items(self, batch: dict[str, Any]) -> Tensor:
        """(terms,) float64: how many items each active term of this batch is a sum over."""
        counts = {
            "diffusion": batch["loss_items"],
            "query_alignment": batch["is_counted"].sum(),
            "attention_alignment": batch["is_sampled"].sum() if "is_sampled" in batch else 0,
            "sparse_distillation": batch.get("sparse_items", 0),
        }
        return torch.tensor([float(counts[name]) for name in self.weights], dtype=torch.float64)

    def sums(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scalar sum of every active term, with gradient; plus "sparse_share", a measurement."""
        settings = self.objective.sparse_distillation
        attention = StreamAttention(
            batch["streams"],
            budget=settings.budget or 0,
            dense_layers=settings.dense_layers,
            observers=self._observers(batch),
        )
        hidden = hidden_states(model, batch["input_ids"], batch["position_ids"], attention.attend).flatten(0, 1)
        head = output_head(model)
        sums = {name: attention.mean_over_layers(name) for name in attention.observers}
        if "diffusion" in self.weights:
            rows = hidden[batch["noisy_from"]]
            sums["diffusion"] = cross_entropy_sum(rows, head, batch["noisy_target"], batch["noisy_weight"])
        if "sparse_distillation" in self.weights:
            sums |= self._sparse_sums(model, batch, hidden, head)
        return sums

    def _observers(self, batch: dict[str, Any]) -> dict[str, tuple[int, Observer]]:
        observers: dict[str, tuple[int, Observer]] = {}
        query = self.objective.query_alignment
        if "query_alignment" in self.weights:

            def align_queries(view: LayerView) -> Tensor:
                at_mask = block_mean_queries(view.mask_rows)
                return torch.stack(
                    [
                        query_alignment_sum(at_mask, block_mean_queries(later), counted, query.distance)
                        for later, counted in zip(view.later_rows, batch["is_counted"], strict=True)
                    ]
                ).sum()

            observers["query_alignment"] = (query.skip_layers, align_queries)
        attention = self.objective.attention_alignment
        if "attention_alignment" in self.weights:
            later_first = attention.direction == "later_to_mask"

            def align_attention(view: LayerView) -> Tensor:
                at_mask = _sampled_attention(view, view.mask_rows, batch)
                return torch.stack(
                    [
                        attention_alignment_sum(
                            at_mask, _sampled_attention(view, later, batch), counted, later_first=later_first
                        )
                        for later, counted in zip(view.later_rows, batch["is_sampled"], strict=True)
                    ]
                ).sum()

            observers["attention_alignment"] = (attention.skip_layers, align_attention)
        return observers

    def _sparse_sums(
        self, model: nn.Module, batch: dict[str, Any], hidden: Tensor, head: nn.Module
    ) -> dict[str, Tensor]:
        settings = self.objective.sparse_distillation
        row: RowStreams = batch["streams"]
        student = hidden[batch["sparse_from"]]
        loss = cross_entropy_sum(student, head, batch["sparse_target"], batch["sparse_weight"])
        if settings.kl_weight > 0:
            teacher = self._teacher_rows(model, batch, hidden)
            divergence = kl_sum(
                student,
                teacher,
                head,
                batch["sparse_weight"],
                teacher_first=settings.direction == "teacher_to_student",
            )
            loss = loss + settings.kl_weight * divergence
        # Blocks that predict something, numbered through the batch, and the length of their prefix.
        blocks = (batch["sparse_from"] // row.block_size).unique()
        is_sparse = blocks * row.block_size % row.total > (settings.budget or 0)
        return {"sparse_distillation": loss, "sparse_share": is_sparse.sum() / max(len(blocks), 1)}

    def _teacher_rows(self, model: nn.Module, batch: dict[str, Any], hidden: Tensor) -> Tensor:
        """(n, hidden) of the exact teacher, without gradient: this pass's noisy stream, or the untuned model's."""
        row: RowStreams = batch["streams"]
        if self.objective.sparse_distillation.teacher == "adapters_on":
            # The same predictions stand at the same place of the first exact noisy stream.
            return hidden[batch["sparse_from"] + row.offset("noisy") - row.offset("sparse")].detach()
        pair = RowStreams(row.length, row.block_size, noisy=1)
        halves = (slice(0, row.length), slice(row.offset("clean"), row.total))  # x_t is what the sparse stream holds
        inputs, positions = (
            torch.cat([batch[name][:, half] for half in halves], dim=1) for name in ("input_ids", "position_ids")
        )
        adapters: PeftModel = model if isinstance(model, PeftModel) else model.module  # type: ignore[assignment]
        with torch.no_grad(), adapters.disable_adapter():
            exact = hidden_states(model, inputs, positions, StreamAttention(pair).attend)
        return exact.flatten(0, 1)[batch["teacher_from"]]


def _sampled_attention(view: LayerView, rows: Tensor, batch: dict[str, Any]) -> Tensor:
    """(batch, KV heads, sampled, N) mean attention of the sampled blocks over their prefix."""
    blocks = batch["sampled_blocks"]
    num_rows, head_dim = rows.shape[-2:]
    index = blocks[:, None, :, None, None].expand(-1, rows.shape[1], -1, num_rows, head_dim)
    key = view.clean_key
    visible = prefix_visible(blocks, key.shape[2], key.shape[2] // rows.shape[2])[:, None]
    return mean_probability(rows.gather(2, index), key, visible, view.scaling)


class MageTrainer(Trainer):
    """transformers' Trainer on stream rows; see the module's docstring."""

    def __init__(self, *, stream_loss: StreamLoss, schedule: Train, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stream_loss = stream_loss
        self.schedule = schedule
        # Our loss is already divided by the items of the whole optimizer step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._logged: dict[str, float] = defaultdict(float)
        self._window = {"tokens": 0, "micro_steps": 0, "started": time.perf_counter()}

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler | None:
        """The data set is the schedule: its order is fixed by the recipe's seed."""
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """(terms,) float64: items of every term over all micro-steps and processes of this optimizer step."""
        if not batch_samples:
            return None
        items = torch.stack([self.stream_loss.items(batch) for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.reduce(items, reduction="sum") if self.accelerator.num_processes > 1 else items

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Weighted sum of the objective's terms for one micro-step."""
        items = self.stream_loss.items(inputs) if num_items_in_batch is None else num_items_in_batch
        with self.accelerator.autocast():  # the output head runs outside the model's own forward
            sums = self.stream_loss.sums(model, inputs)
        loss = torch.zeros((), device=inputs["input_ids"].device)
        for (name, weight), count in zip(self.stream_loss.weights.items(), items.tolist(), strict=True):
            value = sums[name] / max(count, 1.0)
            self._logged[name] += value.item()
            loss = loss + weight * value
        if "sparse_share" in sums:
            self._logged["sparse_share"] += sums["sparse_share"].item() / self.args.gradient_accumulation_steps
        self._window["tokens"] += int(inputs["num_tokens"])
        self._window["micro_steps"] += 1
        # Distributed engines average gradients over processes; the sums above are already over all of them.
        return loss * self.accelerator.num_processes

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Linear warm-up, then the recipe's decay to `final_lr_share` of the peak."""
        if self.lr_scheduler is None:
            target = optimizer if optimizer is not None else self.optimizer
            assert target is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, learning_rate_share(self.schedule))
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add every term, throughput and memory to the Trainer's own log line."""
        if "loss" in logs:
            steps = self._window["micro_steps"] / self.args.gradient_accumulation_steps
            seconds = time.perf_counter() - self._window["started"]
            logs |= {name: value / steps for name, value in self._logged.items()}
            logs["tokens_per_s"] = self._window["tokens"] / seconds
            logs["step_s"] = seconds / steps
            if torch.cuda.is_available():
                logs["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self._logged.clear()
            self._window = {"tokens": 0, "micro_steps": 0, "started": time.perf_counter()}
        super().log(logs, *args, **kwargs)


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


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl; lines after the checkpoint a run resumes from are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget steps that will be done again."""
        if self.path.exists():
            kept = [line for line in self._lines() if json.loads(line)["step"] <= state.global_step]
            self.path.write_text("".join(kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One JSON object a line."""
        if state.is_world_process_zero and logs and "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step} | logs) + "\n")

    def _lines(self) -> Iterator[str]:
        yield from self.path.read_text().splitlines(keepends=True)


def train(recipe: Recipe) -> Path:
    """Run a recipe and return the run folder, with the adapter at its top.

    Raises:
        RecipeError: the folder holds a finished run, or an unfinished one of another recipe.
        ValueError: checkpoint, data or family facts do not fit.
    """
    folder = Path(recipe.output or f"runs/{recipe.name}")
    checkpoint = prepare_folder(folder, recipe)
    backbone = load_recipe_backbone(recipe)
    loss = StreamLoss(recipe.objective)
    num_rows = recipe.train.steps * recipe.train.rows * recipe.train.accumulation
    console = Console(stderr=True)
    arguments = training_arguments(recipe, folder)
    dataset = build_mixture(
        recipe.data, backbone.tokenizer, backbone.family, num_rows * arguments.world_size, recipe.seed
    )
    if arguments.process_index == 0:
        write_facts(folder, recipe, backbone)
        console.print(preview(next(iter(dataset)), backbone.tokenizer))
    model = build_adapter(backbone, recipe)
    trainer = build_trainer(recipe, folder, model, backbone, loss, dataset, arguments, console)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        save_adapter(model, folder)
    return folder


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
        return random_backbone(shape, settings.family or "converted", seed=recipe.seed, dtype=settings.dtype, **facts)
    assert settings.path is not None
    backbone = load_backbone(
        settings.path, family=settings.family, revision=settings.revision, dtype=settings.dtype, **facts
    )
    if recipe.data.length % backbone.family.block_size:
        raise ValueError(
            f"data.length {recipe.data.length} is not a multiple of the block size {backbone.family.block_size}"
        )
    return backbone


def build_adapter(backbone: Backbone, recipe: Recipe) -> PeftModel:
    """The recipe's adapter on the backbone, initialised from the recipe's seed, with its checkpointing choice."""
    if recipe.train.checkpointing != "off":
        enable_checkpointing(backbone.model, use_reentrant=recipe.train.checkpointing == "reentrant")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return attach_adapter(backbone, **recipe.adapter.model_dump())


def enable_checkpointing(model: PreTrainedModel, *, use_reentrant: bool = False) -> None:
    """Recompute every decoder layer in the backward pass."""
    # transformers renamed this within the range we support (5.23 warns about the old name).
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The recipe in transformers' terms."""
    settings = recipe.train
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=settings.accumulation,
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
        save_total_limit=settings.keep_checkpoints,
        dataloader_num_workers=recipe.data.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        average_tokens_across_devices=False,  # our own count of items is already over all processes
        accelerator_config={"dispatch_batches": False},  # a batch's tensors differ in length: it cannot be sliced
        ddp_find_unused_parameters=False,
    )


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
    collator = Collator(
        backbone.family,
        recipe.seed,
        length_multiple=TILE if arguments.device.type == "cuda" else 1,
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
        callbacks=[MetricsFile(folder / "metrics.jsonl"), ProgressReporter(console)],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def prepare_folder(folder: Path, recipe: Recipe) -> str | None:
    """Make the run folder, or find the checkpoint to go on from.

    Raises:
        RecipeError: see `train`.
    """
    if (folder / ADAPTER_FILE).exists():
        raise RecipeError(f"{folder}: holds a finished run; choose another output, or remove the folder to train again")
    if recipe.train.resume not in ("auto", "never"):
        if not (Path(recipe.train.resume) / "trainer_state.json").is_file():
            raise RecipeError(
                f"train.resume: no checkpoint at {recipe.train.resume}; use auto, never or a checkpoint folder"
            )
        return recipe.train.resume
    last = last_checkpoint(folder / "checkpoints")
    if last is None:
        return None
    if recipe.train.resume == "never":
        raise RecipeError(f"{folder}: holds an unfinished run and train.resume is never; remove the folder or use auto")
    started_with = (folder / "recipe.yaml").read_text() if (folder / "recipe.yaml").exists() else ""
    if _without_resume(started_with) != _without_resume(resolved_yaml(recipe)):
        raise RecipeError(
            f"{folder}: holds an unfinished run of a different recipe; choose another output or remove it"
        )
    return last


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, or None: a run may be killed while it saves."""
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]  # this file comes last
    return str(max(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))) if whole else None


def _without_resume(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.strip().startswith("resume:")]


def write_facts(folder: Path, recipe: Recipe, backbone: Backbone) -> None:
    """recipe.yaml, versions.json and the family beside the adapter to come."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(resolved_yaml(recipe))
    (folder / "versions.json").write_text(json.dumps(environment(), indent=2) + "\n")
    write_family(folder, backbone.family)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter at the top of the run folder, weights last, so that their presence means "finished".

    Raises:
        ValueError: a weight is not finite; nothing is written.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(f"{name}: not finite after training; the adapter is not saved, checkpoints are kept")
    temporary = folder / ".adapter"
    model.save_pretrained(str(temporary))
    (temporary / "README.md").unlink(missing_ok=True)  # PEFT's template card; ours is written by publishing
    for file in sorted(temporary.iterdir(), key=lambda f: f.name == ADAPTER_FILE):
        file.rename(folder / file.name)
    temporary.rmdir()


__all__ = ["MageTrainer", "StreamLoss", "causal_lm", "train"]
