"""What a plan predicts, tried: micro-steps of the longest batch on this machine, on random weights of its shape.

    mage-tune plan recipes/7b.yaml --probe

No checkpoint is read and nothing is written. Rows are random tokens of data.length, every one supervised, which no real
batch exceeds; layers, adapter, streams, terms and precision are the recipe's.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from mage_tune.backbone import random_backbone
from mage_tune.data.example import Example
from mage_tune.plan.shape import Shape, read_model
from mage_tune.recipe import Recipe
from mage_tune.run import build_adapter, leave_casts_to_autocast, recipe_collator
from mage_tune.stream_loss import StreamLoss


@dataclass(frozen=True)
class Probed:
    """What the longest batch took."""

    device: str
    fits: bool
    micro_step_s: float | None
    """Median seconds of a micro-step; None where it did not fit."""
    step_s: float | None
    """The same times the micro-steps of an optimizer step."""
    peak_gib: float | None
    """Peak of the caching allocator; None on a CPU."""


def probe(recipe: Recipe, micro_steps: int = 3) -> Probed:
    """Run the longest batch of a recipe, once to warm up and then `micro_steps` times.

    Raises:
        ValueError, OSError: see `plan`.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(_micro_steps(recipe, micro_steps, on_gpu))
    except torch.cuda.OutOfMemoryError:
        return Probed(device, False, None, None, None)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Probed(device, True, seconds, seconds * recipe.train.accumulation, peak)


def _micro_steps(recipe: Recipe, count: int, on_gpu: bool) -> list[float]:
    shape, family = read_model(recipe)
    backbone = random_backbone(
        _random_weights(shape, recipe.data.length),
        family,
        seed=recipe.seed,
        dtype=recipe.model.dtype,
        quantise=recipe.model.quantise,
    )
    model = build_adapter(backbone, recipe).train()
    in_bfloat16 = recipe.train.precision == "bfloat16" or (recipe.train.precision == "auto" and on_gpu)
    if in_bfloat16:
        leave_casts_to_autocast(model)
    loss = StreamLoss(recipe.objective)
    collator = recipe_collator(recipe, backbone.family, loss, on_gpu)
    where = torch.device("cuda" if on_gpu else "cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.train.learning_rate, fused=on_gpu)
    found = []
    for step in range(count + 1):
        batch = collator([_row(row, recipe.data.length) for row in range(recipe.train.rows)])
        batch = {key: x.to(where) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        began = time.perf_counter()
        with torch.autocast(where.type, torch.bfloat16, enabled=in_bfloat16):
            sums = loss.sums(model, batch)
        items = loss.items(batch).tolist()
        parts = zip(loss.weights.items(), items, strict=True)
        torch.stack([weight * sums[name] / max(of, 1.0) for (name, weight), of in parts]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        if step:
            found.append(time.perf_counter() - began)
    return found


def _row(number: int, length: int) -> Example:
    """Random ids that every vocabulary has."""
    ids = np.random.default_rng(number).integers(3, 8, length)
    return Example(number, ids, np.ones(length, dtype=np.float32))


def _random_weights(shape: Shape, length: int) -> dict[str, object]:
    """The shape as a recipe's random_weights would have it."""
    return {
        "architecture": "qwen3" if shape.head_norms else "qwen2" if shape.qkv_bias else "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tie_embeddings": shape.tie_embeddings,
        "max_positions": max(length, 32),
    }
