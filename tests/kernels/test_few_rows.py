"""Products of a few rows, whole and in parts, against float64."""

import pytest
import torch

from mage_kernels.add_norm import add_norm
from mage_kernels.few_rows import MOST_ROWS, gate_up, linear, linear_parts
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
    ("inputs", "outputs", "parts"), [(8192, 64, 4), (8256, 64, 4), (512, 70 * 64, 2), (512, 133 * 64, 1), (512, 128, 4)]
)
def test_parts_add_up_to_the_product(device, dtype, inputs, outputs, parts):
    x, weight = tensors(3, inputs, outputs, dtype, device)
    found = linear_parts(x, weight, impl="triton")
    assert found.shape == (parts, 3, outputs) and found.dtype == (dtype if parts == 1 else torch.float32)
    exact = x.double() @ weight.double().T
    eager = relative_error(linear(x, weight, impl="reference"), exact)
    assert relative_error(found.sum(0), exact) <= 2 * eager + 1e-6


def test_the_first_part_brings_the_bias(device, dtype):
    x, weight = tensors(3, 512, 130, dtype, device)
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
