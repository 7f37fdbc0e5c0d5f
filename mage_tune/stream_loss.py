"""The objective on a training row: which streams its terms need, one forward pass, and the sum of every term.

`mage_tune.objectives` holds the formulas; this module feeds them from the streams of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from mage_tune.backbone import causal_lm, hidden_states, output_head
from mage_tune.objectives import (
    attention_alignment_sum,
    block_mean_queries,
    cross_entropy_sum,
    kl_sum,
    query_alignment_sum,
    undo_rotary,
)
from mage_tune.recipe_schema import TERMS, Objective
from mage_tune.selection import mean_probability, prefix_visible
from mage_tune.streams import LayerView, Observer, RowStreams, StreamAttention


class StreamLoss:
    """The objective on one batch: sums of every active term and how many items each is a sum over."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        weights = {name: getattr(objective, name).weight for name in TERMS}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}

    def collator_needs(self) -> dict[str, Any]:
        """Which streams the rows must carry (arguments of `Collator`)."""
        aligned = {"query_alignment", "attention_alignment"} & self.weights.keys()
        sparse = "sparse_distillation" in self.weights
        settings = self.objective.sparse_distillation
        teacher_is_student = sparse and settings.teacher == "adapters_on"
        # A teacher reads all of x_t, which a sparse stream of some blocks does not hold.
        teacher_reads = sparse and settings.share < 1 and settings.kl_weight > 0
        return {
            "exact_noisy": "diffusion" in self.weights or bool(aligned) or teacher_is_student or teacher_reads,
            "one_view": self.objective.diffusion.views == "one",
            "mask_stream": sparse or bool(aligned),
            "sparse_stream": sparse,
            "student_share": settings.share,
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
        layers = causal_lm(model).config.num_hidden_layers
        if max(settings.layer_budgets, default=0) >= layers:
            last = max(settings.layer_budgets)
            raise ValueError(f"objective.sparse_distillation.layer_budgets: no layer {last} in a model of {layers}")
        attention = StreamAttention(
            batch["streams"],
            budget=settings.budget or 0,
            layer_budgets=settings.layer_budgets,
            student=batch.get("student_blocks"),
            first=batch.get("first"),
            dense_layers=settings.dense_layers,
            observers=self._observers(model, batch),
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

    def _observers(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, tuple[int, Observer]]:
        observers: dict[str, tuple[int, Observer]] = {}
        query = self.objective.query_alignment
        if "query_alignment" in self.weights:
            mean_queries = self._mean_queries(model, batch)

            def align_queries(view: LayerView) -> Tensor:
                at_mask = mean_queries(view.mask_rows)
                return torch.stack(
                    [
                        query_alignment_sum(
                            at_mask, mean_queries(later), counted, query.distance, symmetric=query.symmetric
                        )
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
                            at_mask,
                            _sampled_attention(view, later, batch),
                            counted,
                            later_first=later_first,
                            top_k=attention.top_k,
                            power=attention.power,
                            symmetric=attention.symmetric,
                        )
                        for later, counted in zip(view.later_rows, batch["is_sampled"], strict=True)
                    ]
                ).sum()

            observers["attention_alignment"] = (attention.skip_layers, align_attention)
        return observers

    def _mean_queries(self, model: nn.Module, batch: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """(batch, KV heads, blocks, R, D) queries -> (batch, heads, blocks, D) that query alignment compares."""
        settings, row = self.objective.query_alignment, batch["streams"]
        config = causal_lm(model).config
        group = config.num_attention_heads // config.num_key_value_heads if settings.average == "head" else 1
        if settings.rotary == "after":
            return lambda rows: block_mean_queries(rows, group)
        positions = batch["position_ids"][:, row.offset("clean") :]
        positions = positions if "first" in batch else positions[:1]  # packed rows have positions of their own
        like = torch.empty(0, dtype=torch.float32, device=positions.device)  # tells dtype and device
        cos, sin = causal_lm(model).model.rotary_emb(like, positions)  # (1 or batch, length, D)
        cos, sin = (part.unflatten(1, (-1, row.block_size)) for part in (cos, sin))
        return lambda rows: block_mean_queries(undo_rotary(rows, cos, sin), group)

    def _sparse_sums(
        self, model: nn.Module, batch: dict[str, Any], hidden: Tensor, head: nn.Module
    ) -> dict[str, Tensor]:
        settings = self.objective.sparse_distillation
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
        return {"sparse_distillation": loss, "sparse_share": self._sparse_share(batch)}

    def _sparse_share(self, batch: dict[str, Any]) -> Tensor:
        """Scalar: of the student's blocks that predict something, those that see less than their whole prefix."""
        row: RowStreams = batch["streams"]
        per_row = 2 * row.length // row.block_size  # blocks of [noisy ; clean], as `teacher_from` counts
        shape, device = (len(batch["input_ids"]), per_row), batch["input_ids"].device
        predicts = torch.zeros(shape, dtype=torch.bool, device=device)
        predicts.view(-1)[batch["teacher_from"] // row.block_size] = True  # (a list of them would wait for the GPU)
        prefix = torch.arange(per_row, device=device)
        if "first" in batch:
            first: Tensor = batch["first"]
            prefix = prefix - first[:, prefix.clamp_max(first.shape[1] - 1)]
        is_sparse = prefix * row.block_size > (self.objective.sparse_distillation.budget or 0)
        return (predicts & is_sparse).sum() / predicts.sum().clamp_min(1)

    def _teacher_rows(self, model: nn.Module, batch: dict[str, Any], hidden: Tensor) -> Tensor:
        """(n, hidden) of the exact teacher, without gradient: this pass's noisy stream, or the untuned model's."""
        row: RowStreams = batch["streams"]
        if self.objective.sparse_distillation.teacher == "adapters_on":
            # The same predictions stand at the same place of the first exact noisy stream.
            number, position = batch["teacher_from"] // (2 * row.length), batch["teacher_from"] % (2 * row.length)
            return hidden[number * row.total + row.offset("noisy") + position].detach()
        pair = RowStreams(row.length, row.block_size, noisy=1)
        start = row.offset("noisy" if row.noisy else "sparse")  # both hold x_t
        halves = (slice(start, start + row.length), slice(row.offset("clean"), row.total))
        inputs, positions = (
            torch.cat([batch[name][:, half] for half in halves], dim=1) for name in ("input_ids", "position_ids")
        )
        adapters: PeftModel = model if isinstance(model, PeftModel) else model.module  # type: ignore[assignment]
        with torch.no_grad(), adapters.disable_adapter():
            attention = StreamAttention(pair, first=batch.get("first"))
            exact = hidden_states(model, inputs, positions, attention.attend)
        return exact.flatten(0, 1)[batch["teacher_from"]]


def _sampled_attention(view: LayerView, rows: Tensor, batch: dict[str, Any]) -> Tensor:
    """(batch, KV heads, sampled, N) mean attention of the sampled blocks over their prefix."""
    blocks = batch["sampled_blocks"]
    num_rows, head_dim = rows.shape[-2:]
    index = blocks[:, None, :, None, None].expand(-1, rows.shape[1], -1, num_rows, head_dim)
    key = view.clean_key
    since = batch["first"].gather(1, blocks) if "first" in batch else None
    visible = prefix_visible(blocks, key.shape[2], key.shape[2] // rows.shape[2], since)[:, None]
    return mean_probability(rows.gather(2, index), key, visible, view.scaling, compiled=True)
