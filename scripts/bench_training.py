"""Time training steps on one GPU: random weights of exact shapes, the real trainer; write results/training_h100.json.

    python scripts/bench_training.py --out results/training_h100.json --seconds 500
    python scripts/bench_training.py --list                       # the cases, most important first
    python scripts/bench_training.py --only 7b-64k 1.5b-64k       # some of them
    python scripts/bench_training.py --tiny --out /tmp/t.json     # the same cases on toy shapes, on a CPU, in a minute

A case is a shipped recipe with some keys changed, as `mage-tune train RECIPE --set ...` would change them; its weights
are random and its data are random bytes (step times do not depend on what is learnt, and nothing is). A step is an
optimizer step: data loading, all micro-steps, clipping, AdamW. Times are medians of the steps after warm-up;
utilisation counts two FLOP per multiply-add of forward and input gradient over all streams, attention included,
recompute not (`mage_tune.plan.estimate`), over 989 TFLOP/s. Finished cases of the same commit in --out are not run
again.

Baselines are the same step written the common way: SDPA under a dense mask (or FlexAttention under a BlockMask built
anew in every forward pass, uncompiled), logits of all positions, plain layers, every layer recomputed. They run at the
longest of a few lengths that fits. The case they are held against ("ours" of their row) runs at that length, with the
first of `train.checkpointing` off, mlp and non_reentrant that fits; its row says which.

Every try of a case is a process of its own, since one that ran out of memory does not give all of the card back; with
--tiny, where nothing runs out, all are this process.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from mage_tune import streams  # noqa: E402
from mage_tune.backbone import hidden_states, output_head  # noqa: E402
from mage_tune.bench.clock import sm_mhz  # noqa: E402
from mage_tune.blocks import StreamLayout  # noqa: E402
from mage_tune.data.mixture import build_mixture  # noqa: E402
from mage_tune.environment import environment  # noqa: E402
from mage_tune.families import PUBLISHED  # noqa: E402
from mage_tune.fused import padded  # noqa: E402
from mage_tune.plan import plan  # noqa: E402
from mage_tune.plan.estimate import Estimate  # noqa: E402
from mage_tune.plan.shape import read_model  # noqa: E402
from mage_tune.recipe import Recipe, load_recipe  # noqa: E402
from mage_tune.run import (  # noqa: E402
    build_adapter,
    build_trainer,
    load_recipe_backbone,
    training_arguments,
)
from mage_tune.stream_loss import StreamLoss  # noqa: E402
from mage_tune.streams import StreamAttention  # noqa: E402
from mage_tune.trainer import MageTrainer  # noqa: E402

PEAK_TFLOPS = 989
SHAPES = {
    name: PUBLISHED[name.removesuffix("-convert")]
    for name in ("7b", "1.5b", "sdar-8b", "sdar-1.7b", "smollm2-135m", "smollm2-135m-convert")
}
"""Recipe -> the model whose exact shape it runs on."""
TINY: dict[str, Any] = dict(
    architecture="llama", vocab_size=264, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=8, tie_embeddings=True, max_positions=131072,
)  # fmt: skip
BASELINES = ("dense_sdpa", "block_mask_per_step")
CHECKPOINTING = ("off", "mlp", "non_reentrant")
"""What ours tries beside a baseline, the fastest first."""


@dataclass(frozen=True)
class Case:
    """One line of the results: a recipe, what is changed in it, and how long it is timed."""

    name: str
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    warmup: int = 2
    baseline: str = ""
    """One of BASELINES: the step written the common way."""
    lengths: tuple[int, ...] = ()
    """Tried from the first on until one fits; data.length when empty."""
    profiled: bool = False


FUSED = {"train.kernels": "fused", "train.checkpointing": "off"}
NO_STUDENT = {"objective.sparse_distillation.weight": 0.0}
"""Also of baselines: there is no common way to write that term."""
TINY_BUDGET = 32
"""Keys of the sparse student on toy shapes, whose rows are as short as a shipped recipe's budget."""


def all_cases() -> list[Case]:
    """Every case, most important first."""
    cases = []
    for name in ("7b", "1.5b"):  # what a micro-step costs, one option after another
        short = {"train.accumulation": 2}
        cases += [
            Case(f"{name}-fused", name, FUSED | short, profiled=True),
            Case(f"{name}-plain", name, {"train.kernels": "plain", "train.checkpointing": "non_reentrant"} | short,
                 profiled=True),
            Case(f"{name}-fused-mlp", name, FUSED | short | {"train.checkpointing": "mlp"}),
            Case(f"{name}-fused-recompute", name, FUSED | short | {"train.checkpointing": "non_reentrant"}),
            Case(f"{name}-no-student", name, FUSED | short | NO_STUDENT, profiled=True),
            Case(f"{name}-whole-student", name, FUSED | short | {"objective.sparse_distillation.share": 1.0}),
        ]  # fmt: skip
    cases += [
        Case("smollm2-convert", "smollm2-135m-convert", {}, steps=10, profiled=True),
        Case("smollm2-tune", "smollm2-135m", FUSED, steps=5, profiled=True),
        Case("smollm2-convert-plain", "smollm2-135m-convert", {"train.kernels": "plain"}, steps=10),
        # The bars: 64K tokens of data a step.
        Case("1.5b-64k", "1.5b", FUSED | {"train.rows": 2, "train.accumulation": 8}, steps=10),
        Case("7b-64k", "7b", FUSED | {"train.accumulation": 16}, steps=10),
    ]
    long = {"train.accumulation": 1, "train.kernels": "fused", "train.checkpointing": "non_reentrant"}
    cases += [
        Case("7b-32k", "7b", long | {"data.length": 32768}, warmup=1),
        Case("1.5b-length-64k", "1.5b", long | {"data.length": 65536}, warmup=1),
        Case("7b-qlora-64k", "7b",
             long | {"data.length": 65536, "model.quantise": "nf4", "train.offload": True}, steps=2, warmup=1),
        Case("1.5b-length-128k", "1.5b", long | {"data.length": 131072, "train.offload": True}, steps=1, warmup=1),
        Case("7b-32k-offload", "7b", long | {"data.length": 32768, "train.offload": True}, steps=2, warmup=1),
        Case("7b-qlora", "7b", FUSED | {"model.quantise": "nf4", "train.accumulation": 2}),
        Case("sdar-8b", "sdar-8b", {"train.accumulation": 2}, profiled=True),
        Case("sdar-1.7b", "sdar-1.7b", {"train.accumulation": 2}),
    ]  # fmt: skip
    for name in ("1.5b", "7b"):
        cases += [
            Case(f"{name}-{baseline}", name, {"train.accumulation": 1} | NO_STUDENT, baseline=baseline,
                 lengths=(16384, 8192, 4096, 2048, 1024))
            for baseline in BASELINES
        ]  # fmt: skip
    return cases


def case_recipe(case: Case, length: int | None, tiny: bool, data: Path) -> Recipe:
    """The recipe of a case: the shipped one on random weights and random data."""
    tokens = length or case.changes.get("data.length")
    file = ROOT / "recipes" / f"{case.recipe}.yaml"
    shipped = load_recipe(file)
    model = SHAPES[case.recipe]
    changes = {
        "model": {"family": model.family, "random_weights": TINY if tiny else model.sizes},
        "data.sources": [{"kind": "text", "path": str(data)}],
        "data.workers": 0 if tiny else shipped.data.workers,
        "train.steps": case.warmup + case.steps,
        "output": str(data.parent / "run"),
        **case.changes,
    }
    if case.baseline:
        changes |= {"train.kernels": "plain", "train.checkpointing": "non_reentrant"}
    if tiny:
        scale = 64 if (tokens or shipped.data.length) > 16384 else 16
        tokens = (tokens or shipped.data.length) // scale
        changes |= {"train.accumulation": min(changes.get("train.accumulation", 1), 2)}
        changes |= {f"objective.{name}_alignment.skip_layers": 1 for name in ("query", "attention")}
        changes["train.rows"] = 1
        if shipped.objective.sparse_distillation.budget is not None:
            changes["objective.sparse_distillation.budget"] = TINY_BUDGET
    if tokens:
        changes["data.length"] = tokens
    return load_recipe(file, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


class StepTimer(TrainerCallback):
    """Wall time of optimizer steps, from an idle device until it is idle again, and what they waited for."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.begun = self.ready = 0.0
        self.steps: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.begun = time.perf_counter()

    def before_reading(self) -> None:
        """The host has launched the backward pass and has nothing to do but wait for it."""
        self.ready = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the times, and the clock that the device ran at."""
        _synchronize()
        seconds = time.perf_counter() - self.begun
        self.steps.append({"s": seconds, "host_s": self.ready - self.begun, "sm_mhz": sm_mhz()})
        self.begun = time.perf_counter()

    def after_warmup(self, what: str) -> list[Any]:
        """One of "s", "host_s" (until the device was waited for) and "sm_mhz" of every step that counts."""
        return [step[what] for step in self.steps[self.warmup :]]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_case(case: Case, length: int | None, tiny: bool, folder: Path) -> dict[str, Any]:
    """Run a case once; its row of the results."""
    recipe = case_recipe(case, length, tiny, random_bytes(folder))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    timer = StepTimer(case.warmup)
    with written_commonly(case.baseline):
        trainer, parts = run(recipe, folder, timer, CommonLoss if case.baseline else StreamLoss)
        row = describe(case, recipe, trainer, timer)
        if case.profiled:
            row["profile"] = profile_micro_step(trainer, recipe, parts)
    return row


def run(
    recipe: Recipe, folder: Path, timer: StepTimer, loss_class: type[StreamLoss]
) -> tuple[MageTrainer, Callable[[int], Any]]:
    """Train as `mage_tune.run.train` does, without saving; the trainer, and row number -> example."""
    backbone = load_recipe_backbone(recipe)
    arguments = training_arguments(recipe, folder / "run")
    arguments.save_strategy = "no"  # type: ignore[assignment]
    rows = recipe.train.steps * recipe.train.rows * recipe.train.accumulation
    dataset = build_mixture(recipe.data, backbone.tokenizer, backbone.family, rows, recipe.seed)
    model = build_adapter(backbone, recipe)
    console = Console(stderr=True)
    (folder / "run").mkdir(exist_ok=True)
    trainer = build_trainer(
        recipe, folder / "run", model, backbone, loss_class(recipe.objective), dataset, arguments, console
    )
    trainer.add_callback(timer)
    read = trainer._read_terms

    def noted() -> None:
        timer.before_reading()
        read()

    trainer._read_terms = noted  # type: ignore[method-assign]
    trainer.train()
    return trainer, dataset.__getitem__  # type: ignore[return-value]


def random_bytes(folder: Path, count: int = 2**21) -> Path:
    """A file of random token ids, those of bytes in the random models' tokenizer."""
    path = folder / "ids.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(0).integers(8, 264, count, dtype=np.uint16))
    return path


def what_is_trained(recipe: Recipe, estimate: Estimate) -> dict[str, Any]:
    """What is written down of a recipe on random weights."""
    settings = recipe.train
    return {
        "weights": "random",
        "length": recipe.data.length,
        "rows": settings.rows,
        "accumulation": settings.accumulation,
        "streams": estimate.row.total / estimate.row.length,
        "stream_names": estimate.stream_names,
        "tokens_per_step": settings.rows * settings.accumulation * recipe.data.length,
        "terms": list(StreamLoss(recipe.objective).weights),
        "kl_weight": recipe.objective.sparse_distillation.kl_weight,
        "adapter": f"LoRA rank {recipe.adapter.rank}, {len(estimate._targets)} linear layers",
        "quantised": None if recipe.model.quantise == "none" else recipe.model.quantise,
        "kernels": settings.kernels,
        "checkpointing": settings.checkpointing,
        "offload": settings.offload,
    }


def speed(seconds: Sequence[float], tokens: int, model_tflop: float, gpus: int = 1) -> dict[str, Any]:
    """What is written down of the steps that were timed."""
    step_s = statistics.median(seconds)
    return {
        "step_s": step_s,
        "steps_timed": len(seconds),
        "steps_s": [round(each, 4) for each in seconds],
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "tokens_per_s": tokens / step_s,
        "model_tflop": model_tflop,
        "mfu": model_tflop / step_s / PEAK_TFLOPS / gpus,
    }


def describe(case: Case, recipe: Recipe, trainer: MageTrainer, timer: StepTimer) -> dict[str, Any]:
    """What is written down of a case."""
    estimate, on_gpu = Estimate(recipe, *read_model(recipe)), torch.cuda.is_available()
    trained = what_is_trained(recipe, estimate)
    return {
        "case": case.name,
        "model": case.recipe,
        **trained,
        "engine": "one process",
        "gpus": 1 if on_gpu else 0,
        **speed(timer.after_warmup("s"), trained["tokens_per_step"], estimate.model_flop() / 1e12),
        "host_s": statistics.median(timer.after_warmup("host_s")),
        "sm_mhz": [clock and round(clock) for clock in timer.after_warmup("sm_mhz")],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "predicted_gib": None if case.baseline else plan(recipe).peak_gib,
        "predicted_s": None if case.baseline else plan(recipe).step_s,
        "baseline": case.baseline or None,
        "loss": trainer.state.log_history[0].get("loss"),
    }


# --- where the time of a micro-step goes ------------------------------------------------------------------------------

KERNELS = (
    ("attention backward", re.compile(r"flex_attention_backward|tem_fused.*backward|flash.*bwd|fmha.*backward", re.I)),
    ("attention forward", re.compile(r"flex_attention|triton_tem|flash|fmha|attention", re.I)),
    ("dequantise", re.compile(r"dequant", re.I)),
    ("linear layers", re.compile(r"gemm|nvjet|cutlass|xmma|cublas|splitk", re.I)),
    ("optimizer", re.compile(r"adam|multi_tensor|lpnorm", re.I)),
    ("copies between host and device", re.compile(r"memcpy (dtoh|htod)", re.I)),
)
"""Kernels by name, first match wins; what matches none is glue."""
COMPILED_GRAPH = "## Call CompiledFxGraph"
"""Begins the name of a span on the device that torch.compile marks: its kernels are events of their own."""


def profile_micro_step(trainer: MageTrainer, recipe: Recipe, example: Callable[[int], Any]) -> dict[str, Any]:
    """Device milliseconds of one micro-step and its share of the optimizer, by part and by the longest kernels."""
    batch = trainer.data_collator([example(row) for row in range(recipe.train.rows)])
    model = trainer.model_wrapped.train()

    def step() -> None:
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
        trainer.accelerator.backward(loss)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    step()
    _synchronize()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    began = time.perf_counter()
    with profile(activities=activities, record_shapes=True) as prof:
        step()
        _synchronize()
    wall = time.perf_counter() - began
    vocabulary = read_model(recipe)[0].vocab_size
    parts, kernels = split(prof, recipe.adapter.rank, vocabulary, on_gpu)
    shown = dict(kernels.most_common(25))
    return {"wall_ms": 1e3 * wall, "ms": dict(parts.most_common()), "ms_by_kernel": shown}


def split(prof: Any, rank: int, vocabulary: int, on_gpu: bool) -> tuple[Counter[str], Counter[str]]:
    """(ms by part, ms by kernel). On a CPU operators stand for kernels."""
    parts: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    linked: Counter[str] = Counter()
    for event in prof.events():
        if event.name.startswith(COMPILED_GRAPH):
            continue
        if event.device_type != torch.autograd.DeviceType.CPU:
            kernels[_short(event.name)] += event.device_time / 1e3
            continue
        if not on_gpu:
            kernels[_short(event.name)] += event.self_cpu_time_total / 1e3
            parts[part_of(event.name, event.input_shapes, rank, vocabulary)] += event.self_cpu_time_total / 1e3
            continue
        for kernel in event.kernels:
            linked[_short(kernel.name)] += kernel.duration / 1e3
            parts[part_of(kernel.name, event.input_shapes, rank, vocabulary)] += kernel.duration / 1e3
    for name, ms in (kernels - linked).items() if on_gpu else ():
        parts[part_of(name, None, rank, vocabulary)] += ms  # launched by no operator that the profiler knows
    return parts, kernels


def part_of(kernel: str, shapes: Sequence[Any] | None, rank: int, vocabulary: int) -> str:
    """Which part of a step a kernel belongs to, by its name and by the sizes that its operator was given."""
    sizes = {size for shape in shapes or () if isinstance(shape, list | tuple) for size in shape}
    if vocabulary in sizes:
        return "loss"
    found = next((part for part, pattern in KERNELS if pattern.search(kernel)), "glue")
    is_product = found == "linear layers" or kernel in ("aten::mm", "aten::addmm", "aten::bmm")
    if is_product:
        ranks = {count * size for count in (1, 2, 3) for size in (rank, padded(rank))}  # of layers that share an input
        return "LoRA" if sizes & ranks else "linear layers"
    return found


def _short(name: str) -> str:
    return name if len(name) <= 90 else name[:87] + "..."


# --- the same step written the common way -----------------------------------------------------------------------------


class CommonLoss(StreamLoss):
    """The diffusion term from logits of every position of every stream; alignment as ours."""

    def sums(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See `StreamLoss.sums`."""
        MASKS.clear()
        attention = StreamAttention(batch["streams"], observers=self._observers(model, batch))
        hidden = hidden_states(model, batch["input_ids"], batch["position_ids"], attention.attend).flatten(0, 1)
        logits = output_head(model)(hidden).float()
        target = torch.full(hidden.shape[:1], -100, device=hidden.device)
        weight = torch.zeros(hidden.shape[0], device=hidden.device)
        target[batch["noisy_from"]], weight[batch["noisy_from"]] = batch["noisy_target"], batch["noisy_weight"]
        losses = F.cross_entropy(logits, target, reduction="none", ignore_index=-100)
        return {"diffusion": (losses * weight).sum()} | {
            name: attention.mean_over_layers(name) for name in attention.observers
        }


@contextmanager
def written_commonly(kind: str) -> Iterator[None]:
    """Inside, exact attention is `kind` of BASELINES; ours where it is empty."""
    if not kind:
        yield
        return
    attentions = {"dense_sdpa": dense_attention, "block_mask_per_step": per_step_attention}
    with mock.patch.object(streams, "exact_attention", attentions[kind]):
        yield


MASKS: dict[StreamLayout, Any] = {}
"""Masks of the current forward pass: built in its first layer, seen by the others and by recomputation."""


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: StreamLayout, scaling: float, documents: None = None
) -> Tensor:
    """SDPA under a dense mask; keys are repeated for their groups, as transformers does where there is a mask."""
    if layout not in MASKS:
        MASKS[layout] = layout.dense_mask(query.device)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=MASKS[layout], scale=scaling)


def per_step_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: StreamLayout, scaling: float, documents: None = None
) -> Tensor:
    """Compiled FlexAttention under a mask that `create_block_mask` makes, uncompiled.

    On a CPU, where FlexAttention has no backward pass, SDPA under what the mask's predicate says.
    """
    if layout not in MASKS:
        MASKS[layout] = create_block_mask(
            lambda b, h, q, kv: layout.allowed(q, kv), None, None, layout.total, layout.total, device=query.device
        )
    mask = MASKS[layout]
    if query.is_cuda:
        return streams._compiled_flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    dense = create_mask(mask.mask_mod, 1, 1, layout.total, layout.total, device="cpu")
    return F.scaled_dot_product_attention(query, key, value, attn_mask=dense, scale=scaling, enable_gqa=True)


# --- all cases --------------------------------------------------------------------------------------------------------


def measure(case: Case, tiny: bool, folder: Path) -> dict[str, Any]:
    """The row of a case at the longest of its lengths that fits, or what went wrong.

    A baseline is followed by ours at the same length, in "ours" of its row, recomputing no more than it must to fit.
    """
    row, length = first_that_fits([(case, length) for length in case.lengths or (None,)], tiny, folder)
    if case.baseline and "error" not in row:
        changes = [FUSED | case.changes | {"train.checkpointing": checkpointing} for checkpointing in CHECKPOINTING]
        tries = [(replace(case, baseline="", changes=changed), length) for changed in changes]
        row["ours"], _ = first_that_fits(tries, tiny, folder)
        if "error" in row["ours"]:
            return row | {"error": f"ours: {row['ours']['error']}"}
        row["times_faster"] = row["ours"]["tokens_per_s"] / row["tokens_per_s"]
    return row


def first_that_fits(
    tries: Sequence[tuple[Case, int | None]], tiny: bool, folder: Path
) -> tuple[dict[str, Any], int | None]:
    """(row, length) of the first (case, length) that does not run out of memory; the last, where all do.

    What those before it were is in "did_not_fit" of the row. One that cannot fit by count is not run.
    """
    too_large: list[str] = []
    card = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None
    for case, length in tries:
        hopeless = None if card is None else why_hopeless(case, length, tiny, folder, card)
        row = {"case": case.name, "error": hopeless} if hopeless else run_try(case, length, tiny, folder)
        if "out of memory" not in row.get("error", ""):
            break
        checkpointing = case.changes.get("train.checkpointing", "the case's own")
        too_large.append(f"length {length or 'of the recipe'}, checkpointing {checkpointing}: {row['error'][:160]}")
        print(f"  {too_large[-1]}", flush=True)
    return row | ({"did_not_fit": too_large} if too_large else {}), length


LOGIT_BYTES = 12
"""Of every logit of the common loss at once: the logit, its log-softmax and the gradient, in float32."""
WRONG_BY = 1.15
"""A plan's memory has been up to 7 % too high."""


def why_hopeless(case: Case, length: int | None, tiny: bool, folder: Path, card: float) -> str | None:
    """Why a case cannot fit into a card of so many GiB, without running it; None where it may, or is no recipe."""
    try:
        recipe = case_recipe(case, length, tiny, random_bytes(folder))
    except ValueError:
        return None  # the try says what is wrong
    if case.baseline:
        estimate = Estimate(recipe, *read_model(recipe))
        logits = estimate.tokens * estimate.shape.vocab_size
        needed, what = LOGIT_BYTES * logits / 2**30, f"{LOGIT_BYTES} bytes of every logit"
    else:
        needed, what = plan(recipe).peak_gib / WRONG_BY, f"the plan, less {WRONG_BY - 1:.0%},"
    return f"out of memory by count: {what} needs {needed:.1f} of {card:.1f} GiB" if needed > card else None


def run_try(case: Case, length: int | None, tiny: bool, folder: Path) -> dict[str, Any]:
    """One try of a case: in a process of its own, but for toy shapes."""
    return (attempt if tiny else attempt_alone)(case, length, tiny, folder)


def attempt(case: Case, length: int | None, tiny: bool, folder: Path) -> dict[str, Any]:
    """`time_case`, or what went wrong: one case must not cost the others."""
    try:
        return time_case(case, length, tiny, folder)
    except Exception as failure:
        return {"case": case.name, "error": f"{type(failure).__name__}: {str(failure)[:600]}"}


def attempt_alone(case: Case, length: int | None, tiny: bool, folder: Path) -> dict[str, Any]:
    """`attempt` in a process of its own."""
    job, found = {"case": asdict(case), "length": length, "tiny": tiny, "folder": str(folder)}, folder / "row.json"
    found.unlink(missing_ok=True)
    code = subprocess.run([sys.executable, __file__, "--attempt", json.dumps(job)], check=False).returncode
    if not found.exists():
        return {"case": case.name, "error": f"its process ended with code {code}"}
    row: dict[str, Any] = json.loads(found.read_text())
    return row


def answer_attempt(job: dict[str, Any]) -> int:
    """What the process of `attempt_alone` does."""
    folder = Path(job["folder"])
    row = attempt(Case(**job["case"]), job["length"], job["tiny"], folder)
    (folder / "row.json").write_text(json.dumps(row))
    return 0


def report(row: dict[str, Any]) -> str:
    """A case in one line."""
    if "error" in row:
        return f"{row['case']}: {row['error']}"
    memory = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
    predicted = "" if row["predicted_gib"] is None else f" (predicted {row['predicted_gib']:.1f})"
    faster = f", ours {row['times_faster']:.2f}x as fast" if "times_faster" in row else ""
    return (
        f"{row['case']}: {row['step_s']:.3f} s a step of {row['tokens_per_step']:,} tokens, "
        f"{row['tokens_per_s']:,.0f} tokens/s, utilisation {row['mfu']:.1%}{memory}{predicted}{faster}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases that are not done, until they are or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/training_h100.json"))
    parser.add_argument("--only", nargs="+", help="names of cases, in this order")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no case starts after this many")
    parser.add_argument("--steps", type=int, help="steps timed, in place of each case's own number")
    parser.add_argument("--commit", help="the toolkit's commit, where its history is not at hand")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for a CPU")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--attempt", type=json.loads, help=argparse.SUPPRESS)  # see attempt_alone
    arguments = parser.parse_args(argv)
    if arguments.attempt:
        return answer_attempt(arguments.attempt)
    cases = {case.name: case for case in all_cases()}
    if arguments.list:
        print("\n".join(f"{case.name}: recipes/{case.recipe}.yaml {case.changes}" for case in cases.values()))
        return 0
    unknown = [name for name in arguments.only or () if name not in cases]
    if unknown:
        print(f"error: no case {unknown[0]!r}; --list names them", file=sys.stderr)
        return 2
    began = time.perf_counter()
    versions = environment()
    result: dict[str, Any] = {
        "device": versions.pop("device"),
        "commit": arguments.commit or versions["commit"],
        "command": " ".join(["python", *(sys.argv if argv is None else ["scripts/bench_training.py", *argv])]),
        "versions": {name: found for name, found in versions.items() if name != "commit"},
    }
    result |= {"weights": "random, of the exact shapes: nothing is learnt", "peak_tflops": PEAK_TFLOPS, "rows": []}
    result["rows"] = finished(arguments.out, result["commit"])
    print("RANDOM WEIGHTS of the exact shapes, random data: only time and memory mean anything", flush=True)
    for case in [cases[name] for name in arguments.only or cases]:
        if case.name in {row["case"] for row in result["rows"]}:
            continue
        if time.perf_counter() - began > arguments.seconds:
            print(f"{case.name}: no time left", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            timed = case if arguments.steps is None else replace(case, steps=arguments.steps)
            row = measure(timed, arguments.tiny, Path(folder))
        print(report(row), flush=True)
        result["rows"].append(row)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("error" in row for row in result["rows"]) else 0


def finished(path: Path, commit: str | None) -> list[dict[str, Any]]:
    """Rows of an earlier run at the same commit that went well."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    return [row for row in earlier["rows"] if "error" not in row] if earlier.get("commit") == commit else []


if __name__ == "__main__":
    sys.exit(main())
