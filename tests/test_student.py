"""A student of some blocks: the same predictions as a student of all, and the same expected loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import mage_tune.data.collate as collate_module
from mage_tune.data.collate import Collator
from mage_tune.recipe_schema import Objective
from mage_tune.stream_loss import StreamLoss

BLOCKS = 6
FAMILIES = ["fast_dllm_v2", "sdar", "converted"]
SETTINGS = {"weight": 1.0, "budget": 6, "dense_layers": 1}


def objective(**settings) -> Objective:
    return Objective.model_validate({"diffusion": {"weight": 1.0}, "sparse_distillation": SETTINGS | settings})


class Drawn:
    """In place of the random draw of the student's blocks: these, then the others."""

    def __init__(self, chosen: list[int]) -> None:
        self.chosen = chosen

    def permutation(self, count: int) -> np.ndarray:
        return np.array(self.chosen + [b for b in range(count) if b not in self.chosen])


@pytest.fixture
def measure(tiny_backbone, tiny_adapter, monkeypatch):
    """measure(objective, examples, family, blocks) -> (sparse sum, items, gradients, batch)."""

    def run(goal: Objective, examples, family="converted", chosen=None, **collator):
        backbone = tiny_backbone(family)
        model = tiny_adapter(backbone).double().train()
        if chosen is not None:
            generator = collate_module.noise_generator
            monkeypatch.setattr(
                collate_module,
                "noise_generator",
                lambda seed, row, draw=0: Drawn(chosen) if draw == 2 else generator(seed, row, draw),
            )
        loss = StreamLoss(goal)
        batch = Collator(backbone.family, 0, **loss.collator_needs() | collator)(examples)
        monkeypatch.undo()
        total = loss.sums(model, batch)["sparse_distillation"]
        total.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        return total.item(), float(batch["sparse_items"]), gradients, batch

    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("teacher", ["adapters_off", "adapters_on"])
def test_halves_that_complement_each_other_average_to_the_whole(measure, make_examples, family, teacher):
    """Any half of the blocks is as likely as the other one, so this is the expected loss; gradients too."""
    examples = make_examples((4 * BLOCKS, 3))
    whole, items, gradients, _ = measure(objective(teacher=teacher), examples, family)
    halves = [
        measure(objective(teacher=teacher, share=0.5), examples, family, chosen) for chosen in ([0, 3, 4], [1, 2, 5])
    ]
    assert whole > 0 and all(half[1] == items for half in halves)
    assert sum(half[0] for half in halves) / 2 == pytest.approx(whole, rel=1e-6)
    for number, gradient in enumerate(gradients):
        mean: Tensor = sum(half[2][number] for half in halves) / 2  # type: ignore[assignment]
        torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_a_share_of_one_is_the_whole_row_as_before(measure, make_examples):
    examples = make_examples((24, 0), (18, 3))
    assert measure(objective(share=1.0), examples)[3]["streams"].student_blocks is None
    every = measure(objective(share=0.999), examples)  # six of six blocks, by the other way
    whole = measure(objective(), examples)
    assert every[3]["streams"].student_blocks == 6
    assert every[0] == pytest.approx(whole[0], rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_the_batch_change_nothing(measure, make_examples, family):
    goal, examples = objective(share=0.5), make_examples((24, 3), (9, 0), (17, 6))
    alone = [measure(goal, [example], family)[:2] for example in examples]
    for multiple in (1, 32):
        total, items, _, _ = measure(goal, examples, family, length_multiple=multiple)
        assert total == pytest.approx(sum(one[0] for one in alone), rel=1e-6)
        assert items == pytest.approx(sum(one[1] for one in alone))


def test_the_draw_follows_the_row_and_is_even(tiny_backbone, make_examples):
    family = tiny_backbone("converted").family
    collator = Collator(family, 0, **StreamLoss(objective(share=0.3)).collator_needs())
    (example,) = make_examples((4 * BLOCKS, 0))
    draws = []
    for row in range(300):
        numbered = type(example)(row, example.input_ids, example.loss_weight)
        draws.append(collator([numbered])["student_blocks"][0].tolist())
        assert draws[-1] == sorted(set(draws[-1])) and len(draws[-1]) == 2  # 0.3 of six, rounded up
    assert draws[0] == collator([example])["student_blocks"][0].tolist()
    counts = np.bincount(np.concatenate(draws), minlength=BLOCKS)
    assert counts.min() > 70 and counts.max() < 130  # 100 expected, standard deviation 8


def test_a_quarter_of_the_blocks_costs_a_quarter_of_a_stream(tiny_backbone, make_examples):
    needs = StreamLoss(objective(share=0.25)).collator_needs()
    batch = Collator(tiny_backbone("converted").family, 0, **needs)(make_examples((32, 0)))
    row = batch["streams"]
    assert (row.sparse_length, row.total) == (8, 8 + 3 * 32)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, row.total)
    places = batch["position_ids"][0, :8].view(2, 4)
    assert places.tolist() == [[4 * b + i for i in range(4)] for b in batch["student_blocks"][0].tolist()]
    noisy = batch["input_ids"][0, row.offset("noisy") :]
    assert batch["input_ids"][0, :8].equal(noisy[places.flatten()])


def test_one_view_of_a_family_of_two(tiny_backbone, make_examples):
    family = tiny_backbone("fast_dllm_v2").family
    both, one = (
        Collator(family, 0, **StreamLoss(Objective.model_validate({"diffusion": {"views": views}})).collator_needs())(
            make_examples((24, 0))
        )
        for views in ("family", "one")
    )
    assert (both["streams"].noisy, one["streams"].noisy) == (2, 1)
    first = both["input_ids"][:, :24]
    assert one["input_ids"][:, :24].equal(first)
    masked = (first == family.mask_id).sum()
    assert one["loss_items"] < both["loss_items"] and len(one["noisy_from"]) <= masked
