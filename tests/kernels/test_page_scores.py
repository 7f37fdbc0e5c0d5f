"""Quest's bounds and scores against mage_tune.selection, and that the bounds are bounds."""

import pytest
import torch

from mage_kernels.page_scores import FORMS, page_scores, update_pages
from mage_kernels.testing import random_tensor
from mage_tune.selection import page_bound

LAYERS, BATCH, HEADS, CAPACITY, DIM, PAGE = 2, 3, 2, 70, 24, 8
LENGTHS = (69, 0, 24)


def make(dtype, device, impl="triton"):
    """Keys, lengths, and bounds built in two goes, the second of at most 9 keys."""
    key = random_tensor(LAYERS, BATCH, HEADS, CAPACITY, DIM, dtype=dtype, device=device)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    for row, length in enumerate(LENGTHS):
        key[:, row, :, length:] = float("nan")
    low, high = (torch.full((LAYERS, BATCH, HEADS, 9, DIM), 5.0, dtype=dtype, device=device) for _ in range(2))
    update_pages(low, high, key, (lengths - 9).clamp(min=0), page=PAGE, added=CAPACITY, impl=impl)
    update_pages(low, high, key, lengths, page=PAGE, added=9, impl=impl)
    return key, lengths, low, high


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_bounds_of_every_page(impl, dtype, device):
    key, _, low, high = make(dtype, device, impl)
    for row, length in enumerate(LENGTHS):
        for page in range(9):
            keys = key[:, row, :, page * PAGE : min((page + 1) * PAGE, length)]
            if keys.shape[2] == 0:
                assert (low[:, row, :, page] == 5.0).all() and (high[:, row, :, page] == 5.0).all()
            else:
                assert low[:, row, :, page].equal(keys.amin(2)) and high[:, row, :, page].equal(keys.amax(2))


def test_nothing_added_changes_nothing(device):
    key, lengths, low, high = make(torch.float16, device)
    before = low.clone(), high.clone()
    update_pages(low, high, key * 2, lengths, page=PAGE, added=0, impl="triton")
    assert low.equal(before[0]) and high.equal(before[1])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_scores_are_selections(form, impl, dtype, device):
    key, lengths, low, high = make(dtype, device)
    rows = random_tensor(BATCH, HEADS, 20, DIM, dtype=dtype, device=device, seed=3)
    score = page_scores(rows, low[0], high[0], lengths, page=PAGE, form=form, impl=impl)
    visible = torch.arange(CAPACITY, device=device) < lengths[:, None]
    expected = page_bound(rows.double(), key[0].double().nan_to_num(0.0), visible, PAGE)
    has_keys = (torch.arange(9, device=device) * PAGE < lengths[:, None])[:, None].expand_as(score)
    torch.testing.assert_close(score.double()[has_keys], expected[has_keys], atol=1e-3, rtol=1e-3)
    assert (score[~has_keys] == float("-inf")).all()


def test_no_logit_exceeds_its_page(device):
    key, lengths, low, high = make(torch.float32 if device == "cpu" else torch.float16, device)
    row = random_tensor(BATCH, HEADS, 1, DIM, dtype=key.dtype, device=device, seed=4)
    score = page_scores(row, low[0], high[0], lengths, page=PAGE, form="rows", impl="triton")
    logits = (row.float() @ key[0, :, :, :64].float().transpose(-1, -2)).squeeze(2).unflatten(-1, (8, PAGE))
    assert (logits[0].amax(-1) <= score[0, :, :8] + 1e-3).all()


def test_wrong_numbers_are_named(device):
    key, lengths, low, high = make(torch.float16, device)
    with pytest.raises(ValueError, match="page 12 is not a power of two"):
        page_scores(key[0], low[0], high[0], lengths, page=12)
    with pytest.raises(ValueError, match="form 'dense' is none of mean, matrix, rows"):
        page_scores(key[0], low[0], high[0], lengths, page=PAGE, form="dense")
    with pytest.raises(ValueError, match="low has shape"):
        update_pages(low[:, :, :, :3], high, key, lengths, page=PAGE, added=1)
