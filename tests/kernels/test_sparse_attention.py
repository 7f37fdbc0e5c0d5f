"""Attention over chosen keys: compacted (small_attention), or read through the list (gather_attention)."""

from itertools import product

import pytest
import torch

from mage_kernels.compact import compact
from mage_kernels.exact_attention import exact_attention
from mage_kernels.few_rows import new_arrivals
from mage_kernels.gather_attention import gather_attention
from mage_kernels.small_attention import small_attention
from mage_kernels.testing import check_error, eager_attention, random_tensor
from mage_tune.decode.attention import attention_with_log_mass


def make(rows, capacity, k, own, dim, dtype, device, counts=((0, 1), (37, 12))):
    """Inputs of both operations for a batch of 2 with 2 heads; slots not meant hold NaN."""
    q, key, value, own_key, own_value = (
        random_tensor(2, 2, n, dim, dtype=dtype, device=device, seed=i)
        for i, n in enumerate((rows, capacity, capacity, own, own))
    )
    generator = torch.Generator().manual_seed(9)
    index = torch.stack([torch.randperm(capacity, generator=generator)[:k] for _ in range(4)]).view(2, 2, k)
    index = index.sort(-1).values.int().to(device)
    count = torch.tensor(counts, dtype=torch.int32, device=device)
    buffers = [torch.full((2, 2, k + own, dim), float("nan"), dtype=dtype, device=device) for _ in range(2)]
    compact(key, value, index, count, *buffers)
    for buffer, mine in zip(buffers, (own_key, own_value), strict=True):
        buffer[:, :, k:] = mine
    return q, (key, value), index, count, buffers, (own_key, own_value)


def check_rows(q, caches, index, count, own, scale, out, log_mass):
    for row, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        chosen = index[row, head, : count[row, head]].long()
        keys, values = (torch.cat([x[row, head, chosen], o[row, head]]) for x, o in zip(caches, own, strict=True))
        everything = keys.new_ones(1, dtype=torch.bool)
        exact, mass = attention_with_log_mass(q[row, head].double(), keys.double(), values.double(), everything, scale)
        check_error(out[row, head], exact, eager_attention(q[row, head], keys, values, scale))
        torch.testing.assert_close(log_mass[row, head].double(), mass.squeeze(-1), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("rows", "dim"), [(40, 64), (24, 24)], ids=["R40-D64", "R24-D24"])
def test_against_float64(rows, dim, dtype, device):
    q, caches, index, count, buffers, own = make(rows, 70, 37, 8, dim, dtype, device)
    check_rows(q, caches, index, count, own, 0.2, *small_attention(q, *buffers, count, 0.2, own=8, impl="triton"))
    got = gather_attention(q, *caches, index, count, 0.2, own_key=own[0], own_value=own[1], impl="triton")
    check_rows(q, caches, index, count, own, 0.2, *got)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_token_by_token(device, impl):
    """For each place of the block all query heads, where rows are packed by query head."""
    q, caches, index, count, buffers, own = make(24, 70, 37, 8, 16, torch.float16, device)
    lengths = torch.tensor([70, 23], dtype=torch.int32, device=device)
    of_own = {"own_key": own[0], "own_value": own[1], "impl": impl}
    for attend in (
        lambda **block: small_attention(q, *buffers, count, 0.2, own=8, impl=impl, **block)[0],
        lambda **block: gather_attention(q, *caches, index, count, 0.2, **of_own, **block)[0],
        lambda **block: exact_attention(q, *caches, lengths, 0.2, **of_own, **block).out,
    ):
        rows, tokens = attend(), attend(block=8)
        assert tokens.shape == (2 * 8, 2 * 3 * 16)
        by_place = tokens.view(2, 8, 2, 3, 16)
        for row, place, head, query_head in product(range(2), range(8), range(2), range(3)):
            assert torch.equal(by_place[row, place, head, query_head], rows[row, head, query_head * 8 + place])


def test_rows_of_no_whole_block():
    x, ones = torch.zeros(1, 1, 12, 16), torch.ones(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="12 packed rows are not those of a block of 8 positions"):
        small_attention(x, x, x, ones, 1.0, own=0, block=8)


def test_nothing_seen_is_zero(device):
    q, _, _, count, buffers, _ = make(16, 20, 5, 0, 32, torch.float16, device, counts=((0, 0), (0, 5)))
    out, log_mass = small_attention(q, *buffers, count, 0.2, own=0, impl="triton")
    assert (out[0] == 0).all() and (log_mass[0] == float("-inf")).all()
    assert out.isfinite().all() and log_mass[1, 1].isfinite().all()


def test_duplicates_count_twice(device):
    q, caches, index, count, _, own = make(16, 20, 6, 4, 32, torch.float16, device, counts=((6, 6), (6, 6)))
    index[..., 1] = index[..., 0]
    got = gather_attention(q, *caches, index, count, 0.2, own_key=own[0], own_value=own[1], impl="triton")
    check_rows(q, caches, index, count, own, 0.2, *got)


def test_every_key_chosen_is_exact_attention(device):
    q, caches, _, _, _, own = make(16, 33, 1, 8, 32, torch.float16, device, counts=((1, 1), (1, 1)))
    index = torch.arange(33, dtype=torch.int32, device=device).repeat(2, 2, 1)
    count = torch.full((2, 2), 33, dtype=torch.int32, device=device)
    lengths = torch.full((2,), 33, dtype=torch.int32, device=device)
    kwargs = {"own_key": own[0], "own_value": own[1], "impl": "triton"}
    out, log_mass = gather_attention(q, *caches, index, count, 0.2, **kwargs)
    exact = exact_attention(q, *caches, lengths, 0.2, **kwargs)
    torch.testing.assert_close(out, exact.out, atol=2e-3, rtol=0)
    torch.testing.assert_close(log_mass, exact.log_mass, atol=1e-4, rtol=0)


def test_large_tiles_of_rows_say_the_same(device, monkeypatch):
    from mage_kernels.small_attention import triton

    q, caches, index, count, buffers, own = make(70, 40, 21, 8, 32, torch.float16, device, counts=((21, 3), (0, 12)))
    monkeypatch.setattr(triton, "ONE_WAVE", 0)
    check_rows(q, caches, index, count, own, 0.2, *small_attention(q, *buffers, count, 0.2, own=8, impl="triton"))


SPLITS = [(16, 16, 4, 2, 2), (16, 16, 4, 2, 5), (32, 32, 4, 2, 3), (64, 64, 4, 2, 9)]
SPLITS += [(16, 16, 4, 1, 5, True), (32, 64, 4, 1, 2, True)]


@pytest.mark.parametrize("plan", SPLITS, ids=str)
@pytest.mark.parametrize("own", [8, 0])
def test_split_keys_say_the_same(device, dtype, monkeypatch, plan, own):
    """Keys in parts, some of which have none; twice with the same counters, and the same bits both times."""
    from mage_kernels.small_attention import triton

    counts = ((61, 3), (0, 12)) if own else ((61, 3), (1, 12))
    q, caches, index, count, buffers, mine = make(40, 70, 61, own, 32, dtype, device, counts=counts)
    monkeypatch.setattr(triton, "make_plan", lambda *_: triton.Plan(*plan))
    arrivals = new_arrivals(device)
    found = [small_attention(q, *buffers, count, 0.2, own=own, arrivals=arrivals, impl="triton") for _ in range(2)]
    check_rows(q, caches, index, count, mine, 0.2, *found[0])
    assert all(map(torch.equal, *found)) and not arrivals.any()


FEW = [(2, 192, 512, 5), (4, 224, 512, 5), (8, 128, 512, 5), (2, 192, 500, 5), (2, 192, 100, 2)]
"""Heads, rows and front keys, where every program reads one tile before its wait: 1.5B, 7B, SDAR-8B at batch 1."""
MORE = [(2, 192, 640, 5), (2, 192, 0, 5), (4, 224, 2048, 2), (8, 128, 1024, 2), (16, 192, 512, 1), (64, 192, 512, 1)]
"""More keys are walked, in parts as a sweep found best; 1.5B at batch 8 and more fill the GPU without."""


@pytest.mark.parametrize(("heads", "rows", "front", "parts"), FEW + MORE)
def test_few_heads_are_split(heads, rows, front, parts):
    from mage_kernels.small_attention.triton import make_plan

    is_tile = (heads, rows, front, parts) in FEW
    walked = ((64 if heads == 64 else 16), 64, 4, 3, parts, False)
    assert make_plan(heads, rows, 128, True, front) == ((16, 128, 4, 1, parts, True) if is_tile else walked)
    assert make_plan(heads, rows, 128).parts == 1


def test_nothing_seen_in_parts_is_zero(device, monkeypatch):
    from mage_kernels.small_attention import triton

    monkeypatch.setattr(triton, "make_plan", lambda *_: triton.Plan(16, 16, 4, 2, 2))
    q, _, _, count, buffers, _ = make(16, 20, 5, 0, 32, torch.float16, device, counts=((0, 0), (0, 5)))
    arrivals = new_arrivals(device)
    out, log_mass = small_attention(q, *buffers, count, 0.2, own=0, arrivals=arrivals, impl="triton")
    assert (out[0] == 0).all() and (log_mass[0] == float("-inf")).all()
    assert out.isfinite().all() and log_mass[1, 1].isfinite().all()


@pytest.mark.parametrize("own", [-1, 13])
def test_own_slots_must_exist(own):
    x = torch.zeros(1, 1, 12, 16)
    with pytest.raises(ValueError, match=f"own {own} is not between 0 and the 12 slots"):
        small_attention(x, x, x, torch.ones(1, 1, dtype=torch.int32), 1.0, own=own)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("rows", [96, 128, 192, 224])
@pytest.mark.parametrize("k", [64, 512, 1024])
def test_full_matrix(rows, dim, k, dtype, device):
    counts = ((k, k - 1), (0, k // 2 + 3))
    q, caches, index, count, buffers, own = make(rows, 5003, k, 32, dim, dtype, device, counts)
    check_rows(q, caches, index, count, own, 0.1, *small_attention(q, *buffers, count, 0.1, own=32, impl="triton"))
    got = gather_attention(q, *caches, index, count, 0.1, own_key=own[0], own_value=own[1], impl="triton")
    check_rows(q, caches, index, count, own, 0.1, *got)
