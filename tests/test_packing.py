"""Several examples in a row: every sum, gradient and measurement is that of separate rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mage_tune.blocks import TILE, StreamLayout
from mage_tune.data.collate import Collator
from mage_tune.recipe_schema import Objective
from mage_tune.stream_loss import StreamLoss

FAMILIES = ["fast_dllm_v2", "sdar", "converted"]
LENGTHS = ((24, 3), (9, 0), (17, 6), (4, 0), (13, 2))


def objective(**sparse) -> Objective:
    return Objective.model_validate(
        {
            "diffusion": {"weight": 1.0},
            "query_alignment": {"weight": 0.5, "skip_layers": 1, "rotary": "before"},
            "attention_alignment": {"weight": 0.25, "blocks": 3, "skip_layers": 0, "power": 0.5},
            "sparse_distillation": {"weight": 2.0, "budget": 6, "dense_layers": 1} | sparse,
        }
    )


@pytest.fixture
def measure(tiny_backbone, tiny_adapter):
    """measure(objective, examples, family, **collator) -> (sums, items, gradients, batch)."""

    def run(goal: Objective, examples, family: str, **collator):
        backbone = tiny_backbone(family)
        model = tiny_adapter(backbone).train()
        loss = StreamLoss(goal)
        batch = Collator(backbone.family, 0, **loss.collator_needs() | collator)(examples)
        sums = loss.sums(model, batch)
        items = loss.items(batch)
        torch.stack([sums[name] / items[i] for i, name in enumerate(loss.weights)]).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return {name: value.item() for name, value in sums.items()}, items, gradients, batch

    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sparse", [{}, {"share": 0.5}, {"teacher": "adapters_on", "share": 0.5}], ids=["whole", "half", "own teacher"]
)
def test_packed_examples_are_separate_rows(measure, make_examples, family, sparse):
    examples = make_examples(*LENGTHS)
    apart = measure(objective(**sparse), examples, family)
    packed = measure(objective(**sparse), examples, family, pack_to=40)
    assert packed[3]["input_ids"].shape[0] == 2 < len(examples)
    torch.testing.assert_close(packed[1], apart[1])
    for name, value in apart[0].items():
        assert packed[0][name] == pytest.approx(value, rel=2e-5), name
    for name, gradient in apart[2].items():
        torch.testing.assert_close(packed[2][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_where_examples_begin_and_how_rows_are_padded_changes_nothing(measure, make_examples):
    examples = make_examples(*LENGTHS)
    plain = measure(objective(share=0.5), examples, "converted", pack_to=64)
    tiled = measure(objective(share=0.5), examples, "converted", pack_to=64, document_multiple=16, length_multiple=48)
    assert tiled[3]["streams"].length == 96 and plain[3]["streams"].length == 64
    assert set(tiled[3]["first"].flatten().tolist()) <= set(range(0, 24, 4))
    for name, value in plain[0].items():
        assert tiled[0][name] == pytest.approx(value, rel=2e-5), name


def test_the_longest_first_into_the_first_row_with_room(tiny_backbone, make_examples):
    collator = Collator(tiny_backbone("converted").family, 0, pack_to=40)
    examples = make_examples(*LENGTHS)
    batch = collator(examples)
    assert batch["first"].tolist() == [[0] * 6 + [6] * 4, [0] * 5 + [5] * 3 + [8] + [9]]
    assert batch["num_tokens"] == sum(length for length, _ in LENGTHS)
    assert sorted(batch["rows"]) == [0, 1, 2, 3, 4]
    clean = batch["input_ids"][:, batch["streams"].offset("clean") :]
    for row, at, example in ((0, 0, 0), (0, 24, 4), (1, 0, 2), (1, 20, 1), (1, 32, 3)):
        ids = examples[example].input_ids
        assert clean[row, at : at + len(ids)].tolist() == ids.tolist()
        positions = batch["position_ids"][row, batch["streams"].offset("clean") + at :][: len(ids)]
        assert positions.tolist() == list(range(len(ids)))


def listed(mask, layout: StreamLayout, kind: str) -> np.ndarray:
    """(batch, rows, rows) bool: tiles of a BlockMask's lists."""
    counts, indices = (getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices"))
    rows = layout.total // TILE
    found = np.zeros((len(counts), rows, rows), dtype=bool)
    for b, r in np.ndindex(len(counts), rows):
        found[b, r, indices[b, 0, r, : counts[b, 0, r]].numpy()] = True
    return found


@pytest.mark.parametrize("num_noisy", [0, 1, 2])
def test_the_packed_block_mask_says_what_a_dense_one_does(num_noisy):
    layout = StreamLayout(num_noisy, 5 * TILE, 32)
    per_tile = TILE // 32
    first = torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 3, 4]]).repeat_interleave(per_tile, dim=1) * per_tile
    mask = layout.packed_block_mask(first)
    index = torch.arange(layout.total)
    document = first.repeat_interleave(32, dim=1)[:, index % layout.length]
    dense = layout.dense_mask() & (document[:, :, None] == document[:, None, :])
    tiles = dense.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE))  # (batch, rows, TILE, rows, TILE)
    is_full, is_any = tiles.all(dim=4).all(dim=2).numpy(), tiles.any(dim=4).any(dim=2).numpy()
    full, partial = listed(mask, layout, "full_kv"), listed(mask, layout, "kv")
    assert not (full & ~is_full).any()  # a full tile is never looked into
    assert ((full | partial) == is_any).all()
    inside = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
    by_tile = inside.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2)
    for b, r, c in zip(*np.nonzero(partial & ~full), strict=True):
        assert by_tile[r, c].equal(tiles[b, r, :, c, :])
