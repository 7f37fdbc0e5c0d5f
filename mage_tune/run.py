"""Fine-tuning: one recipe in, one run folder out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from mage_tune.backbone import Backbone, attach_adapter, load_backbone, random_backbone
from mage_tune.blocks import TILE
from mage_tune.callbacks import HoldHead, OwnIntervals, PrefetchLayers, SparedCollections
from mage_tune.data.collate import Collator, length_bucket
from mage_tune.data.mixture import build_mixture, preview
from mage_tune.families import Family
from mage_tune.fused import Recompute, fuse, offloaded_checkpoint
from mage_tune.launcher import micro_steps_per_process
from mage_tune.lm import BlockDiffusionLM
from mage_tune.progress import ProgressReporter, closing
from mage_tune.recipe import Recipe
from mage_tune.run_folder import (
    MetricsFile,
    last_checkpoint,
    prepare_folder,
    save_adapter,
    trained_weights,
    write_facts,
)
from mage_tune.stability import StopOnSignal, TrainingStopped
from mage_tune.stream_loss import StreamLoss
from mage_tune.tracking import Tracking
from mage_tune.trainer import DEEPSPEED, MageTrainer

RECOMPUTED: dict[str, Recompute] = {"off": "nothing", "mlp": "mlp", "non_reentrant": "layer"}
"""What fused layers make again for each value of train.checkpointing."""


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


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Stop LoRA layers from casting their inputs to the adapter's float32; autocast picks the precision.

    (peft.helpers.disable_input_dtype_casting does the same but fails on a model with trainable token rows.)
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


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


def recipe_collator(recipe: Recipe, family: Family, loss: StreamLoss, on_gpu: bool) -> Collator:
    """What makes batches of a recipe's rows."""
    return Collator(
        family,
        recipe.seed,
        length_multiple=length_bucket(recipe.data.length) if on_gpu else 1,
        pack_to=recipe.data.length if recipe.data.packing else None,
        document_multiple=TILE if on_gpu else 1,
        **loss.collator_needs(),
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
    collator = recipe_collator(recipe, backbone.family, loss, arguments.device.type == "cuda")
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
