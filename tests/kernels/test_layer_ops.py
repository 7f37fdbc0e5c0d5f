"""The small fused operations around attention, and the decision of a step, against plain PyTorch."""

from itertools import product

import pytest
import torch

from mage_kernels.add_norm import add_norm
from mage_kernels.few_rows import new_arrivals
from mage_kernels.fill_block import fill_block
from mage_kernels.rope_append import project_append, rope_append
from mage_kernels.silu_mul import silu_mul


def error(found, true):
    return float((found.double() - true).norm() / true.norm())


def within_budget(op, *tensors):
    """The kernel loses at most twice what plain PyTorch loses in the same precision, both against float64."""
    true = op("reference", *(x.double() for x in tensors))
    assert error(op("triton", *tensors), true) <= 2 * error(op("reference", *tensors), true) + 1e-7


@pytest.mark.parametrize(("rows", "hidden"), [(3, 48), (5, 1000)])
@pytest.mark.parametrize("has_delta", [False, True])
def test_add_norm(device, dtype, rows, hidden, has_delta):
    stream, delta = torch.randn(2, rows, hidden, device=device).to(dtype)
    weight = torch.randn(hidden, device=device).to(dtype)

    def op(impl, stream, delta, weight):
        return add_norm(stream.clone(), delta if has_delta else None, weight, 1e-6, impl=impl)

    within_budget(op, stream, delta, weight)
    sums = [stream.clone(), stream.clone()]
    for impl, total in zip(("triton", "reference"), sums, strict=True):
        add_norm(total, delta if has_delta else None, weight, 1e-6, impl=impl)
    assert torch.equal(*sums)
    assert torch.equal(sums[0], stream + delta if has_delta else stream)


@pytest.mark.parametrize("size", [7, 1500])
def test_silu_mul(device, dtype, size):
    within_budget(lambda impl, x: silu_mul(x, impl=impl), torch.randn(3, 2 * size, device=device).to(dtype))


@pytest.mark.parametrize(("head_dim", "has_norm"), [(64, True), (64, False), (96, True), (8, False)])
def test_rope_append(device, dtype, head_dim, has_norm):
    batch, size, heads, kv_heads, slots = 2, 4, 6, 2, 40
    qkv = torch.randn(batch * size, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    norms = torch.randn(2, head_dim, device=device).to(dtype)
    angle = torch.arange(64, device=device)[:, None] * torch.rand(head_dim // 2, device=device)
    start = torch.tensor([3, 17], dtype=torch.int32, device=device)
    at = torch.tensor([0, 36], dtype=torch.int32, device=device)
    written = torch.zeros(batch, 1, slots, 1, dtype=torch.bool, device=device)
    written[0, :, 0:4] = written[1, :, 36:40] = True

    def op(impl, qkv, norms):
        cache = torch.full((2, batch, kv_heads, slots, head_dim), torch.nan, dtype=qkv.dtype, device=device)
        query_norm, key_norm = norms if has_norm else (None, None)
        table = angle.cos(), angle.sin()
        rows = rope_append(qkv, *table, start, *cache, at, query_norm, key_norm, 1e-6, impl=impl)
        assert torch.equal(~cache.isnan(), written.expand_as(cache[0]).expand_as(cache))
        return torch.cat([rows.flatten(), cache[~cache.isnan()]])

    within_budget(op, qkv, norms)


def test_rope_append_adds_up_parts(device, dtype):
    batch, size, heads, kv_heads, head_dim = 2, 4, 6, 2, 16
    parts = torch.randn(3, batch * size, (heads + 2 * kv_heads) * head_dim, device=device)
    angle = torch.rand(8, head_dim // 2, device=device)
    at = torch.tensor([0, 2], dtype=torch.int32, device=device)
    for qkv_of, impl in product((lambda p: p, lambda p: (p[0] + p[1] + p[2]).to(dtype)), ("triton", "reference")):
        cache = torch.zeros(2, batch, kv_heads, 8, head_dim, dtype=dtype, device=device)
        rows = rope_append(qkv_of(parts), angle.cos(), angle.sin(), at, *cache, at, impl=impl)
        assert rows.dtype == dtype
        if qkv_of(parts) is parts and impl == "triton":
            expected = rows, cache
        torch.testing.assert_close((rows, cache), expected, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-5)


def test_rope_append_packs_rows_by_head_and_keeps_lengths(device, dtype):
    """Rotation by position zero is the identity: what comes out is what went in, head by head."""
    batch, size, heads, kv_heads, head_dim = 1, 4, 4, 2, 16
    qkv = torch.randn(size, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    table = torch.ones(9, 8, device=device), torch.zeros(9, 8, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    keys, values = torch.zeros(2, batch, kv_heads, size, head_dim, dtype=dtype, device=device)
    rows = rope_append(qkv, *table, zero, keys, values, zero, impl="triton")
    by_head = qkv.view(size, -1, head_dim).transpose(0, 1)
    assert torch.equal(rows.view(heads, size, head_dim), by_head[:heads])
    assert torch.equal(keys[0], by_head[heads : heads + kv_heads])
    assert torch.equal(values[0], by_head[heads + kv_heads :])


PROJECTED = [(32, {}, True), (64, {"block_n": 16, "parts": 1}, True), (64, {"block_n": 32, "parts": 3}, False)]
PROJECTED += [(128, {"block_n": 64, "parts": 2}, True), (128, {"block_n": 128, "block_k": 32}, False)]


@pytest.mark.parametrize(("head_dim", "changes", "has_norm"), PROJECTED, ids=str)
def test_project_append(device, dtype, monkeypatch, head_dim, changes, has_norm):
    """A projection and `rope_append` in one launch; with the last factor of a norm before it, or without."""
    from mage_kernels.rope_append import triton

    batch, size, heads, kv_heads, slots, inputs = 2, 5, 4, 2, 40, 192
    width = (heads + 2 * kv_heads) * head_dim
    weight = (torch.randn(width, inputs, device=device) * inputs**-0.5).to(dtype)
    plan = triton.make_plan(weight, can_split=True)._replace(**changes)
    monkeypatch.setattr(triton, "make_plan", lambda *_, **__: plan)
    x = 3 * torch.randn(batch * size, inputs, device=device).to(dtype)
    squares = x.double().square().view(len(x), 2, -1).sum(-1).T.contiguous() if has_norm else None
    bias = torch.randn(width, device=device).to(dtype) if has_norm else None
    angle = torch.arange(64, device=device)[:, None] * torch.rand(head_dim // 2, device=device)
    start = torch.tensor([3, 17], dtype=torch.int32, device=device)
    at = torch.tensor([0, 35], dtype=torch.int32, device=device)
    written = torch.zeros(batch, 1, slots, 1, dtype=torch.bool, device=device)
    written[0, :, 0:5] = written[1, :, 35:40] = True
    arrivals, found = new_arrivals(device), []

    def op(impl, x, weight, bias):
        cache = torch.full((2, batch, kv_heads, slots, head_dim), torch.nan, dtype=x.dtype, device=device)
        place = angle.cos(), angle.sin(), start, *cache, at, arrivals
        sums = squares if squares is None or x.dtype == torch.float64 else squares.float()
        rows = project_append(x, weight, bias, *place, squares=sums, eps=1e-6, impl=impl)
        assert torch.equal(~cache.isnan(), written.expand_as(cache[0]).expand_as(cache))
        assert not arrivals.any()
        found.append(torch.cat([rows.flatten(), cache[~cache.isnan()]]))
        return found[-1]

    exact = op("reference", x.double(), weight.double(), None if bias is None else bias.double())
    theirs = error(op("reference", x, weight, bias), exact)
    assert error(op("triton", x, weight, bias), exact) <= 2 * theirs + 1e-6
    assert torch.equal(found[-1], op("triton", x, weight, bias)), "the same bits again"


FILLS = [*product((0, 1), (None, 0.6), [(8, 8), (12, 4)]), (1, 0.6, (32, 8))]


@pytest.mark.parametrize(("shift", "threshold", "sizes"), FILLS, ids=str)
def test_fill_block(device, shift, threshold, sizes):
    """Step by step until everything is decided, ties among the confidences included."""
    batch, mask_id, (size, window) = 3, 99, sizes
    quotas = torch.tensor([2, 1], device=device)
    states = []
    for impl in ("triton", "reference"):
        generator = torch.Generator().manual_seed(size + window)
        ids = torch.full((batch, size), mask_id, device=device)
        ids[:, 0], ids[2, 5] = 7, 8
        progress = torch.zeros(batch, 3, dtype=torch.int64, device=device)
        progress[:, 0] = -1
        left = torch.zeros(batch, dtype=torch.int64, device=device)
        history = []
        for _ in range(size):
            token = torch.randint(0, 50, (batch, size), generator=generator).to(device)
            sure = (torch.randint(0, 8, (batch, size), generator=generator) / 8).to(device)
            options = dict(mask_id=mask_id, window=window, shift=shift, threshold=threshold)
            fill_block(ids, token, sure, progress, left, quotas, impl=impl, **options)
            assert torch.equal(left, (ids == mask_id).sum(-1))
            history.append((ids.tolist(), progress.tolist()))
        assert left.tolist() == [0, 0, 0]
        states.append(history)
    assert states[0] == states[1]


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_fill_block_takes_the_surest_and_the_earlier_of_equals(device, impl):
    ids = torch.tensor([[9, 99, 99, 99, 99, 99]], device=device)
    token = torch.tensor([[10, 11, 12, 13, 14, 15]], device=device)
    sure = torch.tensor([[0.1, 0.5, 0.9, 0.5, 0.95, 1.0]], device=device)
    progress, left = torch.tensor([[-1, 0, 0]], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    quotas = torch.tensor([3], device=device)
    fill_block(ids, token, sure, progress, left, quotas, mask_id=99, window=6, shift=1, threshold=None, impl=impl)
    assert ids.tolist() == [[9, 99, 11, 12, 99, 14]]
    assert (progress.tolist(), left.tolist()) == ([[0, 1, 1]], [2])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_fill_block_remembers_nan(device, impl):
    ids = torch.tensor([[99, 99], [99, 99]], device=device)
    sure = torch.tensor([[0.5, torch.nan], [0.5, 0.6]], device=device)
    progress = torch.tensor([[-1, 0, 0]] * 2, device=device)
    left = torch.zeros(2, dtype=torch.int64, device=device)
    quotas = torch.ones(1, dtype=torch.int64, device=device)
    for confidence in (sure, torch.ones(2, 2, device=device)):
        token = torch.zeros(2, 2, dtype=torch.int64, device=device)
        options = dict(mask_id=99, window=2, shift=0, threshold=None)
        fill_block(ids, token, confidence, progress, left, quotas, impl=impl, **options)
        assert left[0] == -1
    assert left[1] == 0


def test_shapes_that_do_not_fit(device):
    x = torch.zeros(2, 6, device=device)
    with pytest.raises(ValueError, match="weight has shape"):
        add_norm(x, None, torch.ones(5, device=device), 1e-6)
    with pytest.raises(ValueError, match="2 \\* size"):
        silu_mul(torch.zeros(2, 5, device=device))
    with pytest.raises(RuntimeError, match="not contiguous"):
        silu_mul(torch.zeros(6, 2, device=device).T, impl="triton")
