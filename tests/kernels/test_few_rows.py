"""Products of a few rows, whole and in parts, against float64."""

import pytest
import torch

from mage_kernels.add_norm import add_norm
from mage_kernels.few_rows import MOST_ROWS, add_linear, gate_up, linear, linear_parts, new_arrivals
from mage_kernels.testing import relative_error

SHAPES = [(1, 64, 64), (17, 192, 100), (32, 256, 129)]
"""Rows, inputs, outputs."""


def tensors(rows, inputs, outputs, dtype, device):
    x = torch.randn(rows, inputs, device=device).to(dtype)
    return x, (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear(device, dtype, shape):
    x, weight = tensors(*shape, dtype, device)
    exact = x.double() @ weight.double().T
    found = linear(x, weight, impl="triton")
    assert found.dtype == dtype and found.shape == exact.shape
    assert relative_error(found, exact) <= 2 * relative_error(linear(x, weight, impl="reference"), exact) + 1e-6


@pytest.mark.parametrize(
    ("inputs", "outputs", "parts"),
    [(8192, 64, 16), (8256, 64, 15), (1024, 70 * 64, 2), (1024, 133 * 64, 1), (576, 128, 1)],
)
def test_parts_add_up_to_the_product(device, dtype, inputs, outputs, parts):
    x, weight = tensors(3, inputs, outputs, dtype, device)
    found = linear_parts(x, weight, impl="triton")
    assert found.shape == (parts, 3, outputs) and found.dtype == (dtype if parts == 1 else torch.float32)
    exact = x.double() @ weight.double().T
    eager = relative_error(linear(x, weight, impl="reference"), exact)
    assert relative_error(found.sum(0), exact) <= 2 * eager + 1e-6


def test_the_first_part_brings_the_bias(device, dtype):
    x, weight = tensors(3, 1088, 130, dtype, device)
    bias = torch.randn(130, device=device).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    parts = linear_parts(x, weight, bias, impl="triton")
    assert len(parts) > 1
    eager = relative_error(linear_parts(x, weight, bias, impl="reference")[0], exact)
    assert relative_error(parts.sum(0), exact) <= 2 * eager + 1e-6


def test_add_norm_takes_parts(device, dtype):
    stream, weight = torch.randn(5, 96, device=device).to(dtype), torch.randn(96, device=device).to(dtype)
    parts = torch.randn(4, 5, 96, device=device)
    whole = stream + parts.sum(0).to(dtype)
    for impl in ("triton", "reference"):
        total = stream.clone()
        normed = add_norm(total, parts, weight, 1e-6, impl=impl)
        assert torch.allclose(total.float(), whole.float(), rtol=2e-3, atol=2e-3)
        exact = torch.nn.functional.rms_norm(total.double(), (96,), weight.double(), 1e-6)
        assert relative_error(normed, exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("rows", "inputs", "size"), [(2, 64, 32), (32, 192, 96)])
def test_gate_up(device, dtype, rows, inputs, size):
    x, weight = tensors(rows, inputs, 2 * size, dtype, device)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    found = gate_up(x, weight, impl="triton")
    assert found.dtype == dtype and found.shape == exact.shape
    assert relative_error(found, exact) <= 2 * relative_error(gate_up(x, weight, impl="reference"), exact) + 1e-6


PUBLISHED = [(1536, 8960, 5), (3584, 3584, 2), (4608, 3584, 2), (3584, 18944, 2)]
"""1.5B's down, 7B's output, q k v and down: outputs, inputs, and parts that the sweep found best or within 2 %."""


@pytest.mark.parametrize(("outputs", "inputs", "parts"), PUBLISHED)
def test_plans_of_published_shapes(outputs, inputs, parts):
    from mage_kernels.few_rows.triton import make_plan, split

    weight = torch.empty(outputs, inputs, device="meta")
    plan = make_plan(weight, can_split=True)
    assert plan == (64, 128, parts, 4, 6 if inputs > 8192 else 4)
    assert split(plan, torch.empty(32, inputs, device="meta"))[0] == plan, "nothing is rounded away"
    assert make_plan(weight, can_split=False) == (64, 128, 1, 4, 3)


@pytest.mark.parametrize(("outputs", "inputs", "parts"), [(1536, 1536, 3), (2048, 1536, 3), (2048, 2048, 4)])
def test_small_weights_are_read_in_tiles(outputs, inputs, parts):
    """1.5B's output and q k v, SDAR-1.7B's output."""
    from mage_kernels.few_rows.triton import make_plan, split

    plan = make_plan(torch.empty(outputs, inputs, device="meta"), can_split=True)
    assert plan == (64, 512, parts, 4, 1)
    assert split(plan, torch.empty(32, inputs, device="meta")) == (plan, plan.block_k)


def plan_of(monkeypatch, **changes):
    """Weights are read under a plan with changes."""
    from mage_kernels.few_rows import triton

    make = triton.make_plan
    monkeypatch.setattr(triton, "make_plan", lambda *given, **how: make(*given, **how)._replace(**changes))


NARROW, WIDE = {"block_n": 16, "parts": 1}, {"block_n": 64, "block_k": 64, "parts": 4}
ADDED = [(1, 64, 64, NARROW), (17, 192, 100, WIDE), (32, 256, 129, NARROW), (32, 320, 129, WIDE), (5, 1024, 64, {})]


@pytest.mark.parametrize(("rows", "inputs", "outputs", "changes"), ADDED)
def test_add_linear_and_the_product_that_follows(device, dtype, monkeypatch, rows, inputs, outputs, changes):
    """Stream, norm and next product against float64, twice with the same counters; the same bits both times."""
    x, weight = tensors(rows, inputs, outputs, dtype, device)
    plan_of(monkeypatch, **changes)
    before, gain = 3 * torch.randn(rows, outputs, device=device).to(dtype), torch.rand(outputs, device=device).to(dtype)
    exact = before.double() + x.double() @ weight.double().T
    eager = before + linear(x, weight, impl="reference")
    normed = torch.nn.functional.rms_norm(exact, (outputs,), gain.double(), 1e-6)
    eager_normed = torch.nn.functional.rms_norm(eager, (outputs,), gain, 1e-6)
    arrivals, found = new_arrivals(device), []
    for _ in range(2):
        stream = before.clone()
        values, squares = add_linear(stream, x, weight, gain, arrivals, impl="triton")
        assert not arrivals.any()
        assert squares.shape[1:] == (rows,) and squares.dtype == torch.float32
        assert relative_error(stream, exact) <= 2 * relative_error(eager, exact) + 1e-6
        scaled = values.double() * torch.rsqrt(squares.double().sum(0) / outputs + 1e-6)[:, None]
        assert relative_error(scaled, normed) <= 2 * relative_error(eager_normed, normed) + 1e-6
        found.append((stream, values, squares))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("tiles", [1, 3])
def test_products_finish_a_norm(device, dtype, tiles):
    """Rows and their squares from `add_linear`, as a product of their norm; large rows and small ones."""
    rows, inputs, outputs = 5, 192, 128
    x, weight = tensors(rows, inputs, outputs, dtype, device)
    x *= torch.tensor([1.0, 100.0, 1e-3, 7.0, 0.0], device=device)[:, None].to(dtype)
    squares = x.float().square().view(rows, tiles, -1).sum(-1).T.contiguous()
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    eager = normed.to(dtype)
    given, bias = {"squares": squares, "eps": 1e-6}, torch.randn(outputs, device=device).to(dtype)
    product = normed @ weight.double().T
    gate, up = product.chunk(2, dim=-1)
    for op, exact in (
        (linear, product),
        (lambda x, w, **how: linear_parts(x, w, bias, **how).sum(0), product + bias.double()),
        (gate_up, torch.nn.functional.silu(gate) * up),
    ):
        theirs = relative_error(op(eager, weight, impl="reference"), exact)
        for impl in ("triton", "reference"):
            assert relative_error(op(x, weight, **given, impl=impl), exact) <= 2 * theirs + 1e-6


def test_add_linear_reference(device):
    x, weight, gain = (torch.randn(*n, device=device) for n in ((3, 24), (10, 24), (10,)))
    stream = torch.randn(3, 10, device=device)
    expected = stream + x @ weight.T
    values, squares = add_linear(stream, x, weight, gain, new_arrivals(x.device), impl="reference")
    torch.testing.assert_close(stream, expected)
    torch.testing.assert_close(values, expected * gain)
    torch.testing.assert_close(squares, expected.square().sum(-1)[None])


def test_what_the_kernels_do_not_take(device, dtype):
    x, weight = tensors(MOST_ROWS + 1, 64, 64, dtype, device)
    with pytest.raises(RuntimeError, match="33 rows are more than 32"):
        linear(x, weight, impl="triton")
    with pytest.raises(RuntimeError, match="65 inputs are no multiple of 64"):
        linear(*tensors(2, 65, 64, dtype, device), impl="triton")
    with pytest.raises(RuntimeError, match="multiple of 32 rows"):
        gate_up(*tensors(2, 64, 2 * 33, dtype, device), impl="triton")
    with pytest.raises(ValueError, match="does not fit"):
        linear(x, weight[:, :32], impl="triton")
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight)) or x.is_cuda
