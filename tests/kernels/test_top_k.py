"""Top-k: order, ties, forced keys, short rows, and rows too long for one program."""

import pytest
import torch

from mage_kernels.testing import random_tensor
from mage_kernels.top_k import top_k
from mage_tune.selection import top_pages


@pytest.fixture(params=["direct", "grouped"])
def width(request, monkeypatch, device):
    """Rows short enough for one program, and the same rows narrowed first."""
    from mage_kernels.top_k import triton

    if request.param == "grouped":
        monkeypatch.setattr(triton, "SINGLE_WIDTH", 16)
        monkeypatch.setattr(triton, "MAX_WIDTH", 128)
    return request.param


def scores(device, batch=2, heads=2, size=150):
    """Distinct numbers, equal ones, both zeros, and the ends of the range."""
    score = random_tensor(batch, heads, size, dtype=torch.float32, device=device)
    score[0, 0, ::3] = 0.5
    score[0, 0, 1::6] = -0.0
    score[0, 1] = 0.0
    score[0, 1, 2::4] = -0.0
    score[1, 0, 7] = float("-inf")
    score[1, 0, 9] = 3e38
    return score


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (3, 5)])
@pytest.mark.parametrize("k", [1, 6, 40])
def test_equals_selections(k, sinks, recent, width, device):
    score, lengths = scores(device), torch.tensor([150, 33], dtype=torch.int32, device=device)
    sinks, recent = min(sinks, k), min(recent, k - min(sinks, k))
    got = top_k(score, k, lengths, sinks=sinks, recent=recent, impl="triton")
    index, is_kept = top_pages(score, [k, k], 1, lengths.long(), sinks, recent)
    for row in range(2):
        count = min(k, int(lengths[row]))
        assert (got.count[row] == count).all()
        assert got.index[row, :, :count].equal(index[row, :, :count].int()) and is_kept[row, :, :count].all()
        assert (got.index[row, :, count:] == 0).all()


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 20), (0, 1)])
def test_pages_are_selections(sinks, recent, device):
    score, page = scores(device), 16
    lengths = torch.tensor([150 * page - 3, 40], dtype=torch.int32, device=device)
    got = top_k(score, 5, lengths, page=page, sinks=sinks, recent=recent, impl="triton")
    index, is_kept = top_pages(score, [5, 5], page, lengths.long(), sinks, recent)
    for row, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        pages = (index[row, head][is_kept[row, head]] // page).unique()
        assert got.index[row, head, : got.count[row, head]].tolist() == pages.tolist()


@pytest.mark.parametrize("k", [1, 6, 40])
def test_reference_says_the_same(k, width, device):
    lengths = torch.tensor([150, 33], dtype=torch.int32, device=device)
    for forced in ({}, {"sinks": 1, "recent": 7}):
        mine, theirs = (top_k(scores(device), k, lengths, **forced, impl=i) for i in ("triton", "reference"))
        for name in ("index", "count", "worst_chosen", "best_left"):
            assert getattr(mine, name).equal(getattr(theirs, name)), name


def test_a_length_for_every_row(width, device):
    lengths = torch.tensor([[150, 0], [7, 33]], dtype=torch.int32, device=device)
    got = top_k(scores(device), 10, lengths, impl="triton")
    assert got.count.tolist() == [[10, 0], [7, 10]]
    assert got.worst_chosen[0, 1] == float("inf") and got.best_left[0, 1] == float("-inf")
    assert got.index[1, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0, 0]


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("forced", [{}, {"sinks": 2, "recent": 3}])
def test_entries_of_some_groups(forced, impl, device):
    """Scores of groups 1, 4 and 9 alone, against the same with every other score out of the question."""
    size, score = 8, scores(device)
    lengths = torch.tensor([79, 38], dtype=torch.int32, device=device)
    index = torch.tensor([0, 4, 9, 1], dtype=torch.int32, device=device).repeat(2, 2, 1)
    count = torch.tensor([[3, 3], [2, 0]], dtype=torch.int32, device=device)
    packed = torch.nn.functional.pad(score, (0, 2)).unflatten(-1, (-1, size))[:, :, index[0, 0].long()].flatten(2)
    got = top_k(packed.contiguous(), 10, lengths, groups=(index, count, size), **forced, impl=impl)
    outside = torch.full_like(score, -3.4e38)
    for row, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        for group in index[row, head, : count[row, head]].tolist():
            entries = slice(group * size, group * size + size)
            outside[row, head, entries] = score[row, head, entries]
    full = top_k(outside, 10, lengths, **forced, impl="reference")
    assert got.count.tolist() == [[10, 10], [10, 0]]
    assert got.index[:, 0].equal(full.index[:, 0]) and got.index[0, 1].equal(full.index[0, 1])
    assert (got.index[1, 1] == 0).all()
    assert got.worst_chosen[:, 0].equal(full.worst_chosen[:, 0])


def test_layers_share_the_lengths_of_the_batch(device):
    score, lengths = scores(device), torch.tensor([20, 33], dtype=torch.int32, device=device)
    single = top_k(score, 10, lengths, impl="triton")
    layered = top_k(score.repeat(3, 1, 1, 1), 10, lengths, impl="triton")
    assert layered.index.equal(single.index.repeat(3, 1, 1, 1))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_rows_may_want_fewer(impl, width, device):
    score, most = scores(device), torch.tensor([[1, 10], [4, 7]], dtype=torch.int32, device=device)
    lengths = torch.tensor([150, 6], dtype=torch.int32, device=device)
    got = top_k(score, 10, lengths, most=most, sinks=1, impl=impl)
    assert got.count.tolist() == [[1, 10], [4, 6]]
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        k = int(most[row, head])
        alone = top_k(score, k, lengths, sinks=1, impl="reference")
        assert got.index[row, head, :k].equal(alone.index[row, head]) and (got.index[row, head, k:] == 0).all()
        assert got.worst_chosen[row, head] == alone.worst_chosen[row, head]
        assert got.best_left[row, head] == alone.best_left[row, head]


def test_more_slots_than_entries(width, device):
    score = scores(device)[..., :5].contiguous()
    got = top_k(score, 9, torch.tensor([5, 3], dtype=torch.int32, device=device), impl="triton")
    assert got.index.tolist() == [[[0, 1, 2, 3, 4, 0, 0, 0, 0]] * 2, [[0, 1, 2, 0, 0, 0, 0, 0, 0]] * 2]


def test_what_does_not_fit_is_said(device):
    score = torch.zeros(1, 1, 100000, device=device)
    lengths = torch.tensor([100000], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"top_k: impl='triton' cannot run: k 10000 is too large"):
        top_k(score, 10000, lengths, impl="triton")
    with pytest.raises(ValueError, match="must be positive"):
        top_k(score, 0, lengths)
    with pytest.raises(ValueError, match="contiguous float32"):
        top_k(score.half(), 1, lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1024, 8191, 32768, 131072 + 77])
@pytest.mark.parametrize("k", [64, 512, 2048])
def test_full_matrix(size, k, device):
    score = torch.rand(7, 2, 4, size, device=device)
    score[..., ::3] = 0.999
    lengths = torch.tensor([size, size // 2 - 5], dtype=torch.int32, device=device)
    mine, theirs = (top_k(score, k, lengths, sinks=4, recent=9, impl=i) for i in ("triton", "reference"))
    assert mine.index.equal(theirs.index) and mine.count.equal(theirs.count)
    assert mine.worst_chosen.equal(theirs.worst_chosen) and mine.best_left.equal(theirs.best_left)
