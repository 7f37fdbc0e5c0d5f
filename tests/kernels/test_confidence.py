"""Greedy choice and probability over a vocabulary that is not a power of two."""

import pytest
import torch

from mage_kernels.confidence import confidence
from mage_kernels.testing import random_tensor


@pytest.mark.parametrize("exclude", [None, 17])
@pytest.mark.parametrize("vocabulary", [50, 20011])
def test_equals_softmax(vocabulary, exclude, dtype, device):
    logits = random_tensor(5, vocabulary, dtype=dtype, device=device) * 3
    logits[1, [30, 40]] = 40.0  # equal ones: the lower id
    logits[2, 17] = 50.0
    token, probability = confidence(logits, exclude=exclude, impl="triton")
    expected = logits.double().softmax(-1)
    allowed = logits.double().clone()
    if exclude is not None:
        allowed[:, exclude] = float("-inf")
    best = [row.tolist().index(row.max().item()) for row in allowed]
    assert token.tolist() == best and token.dtype == torch.int64
    torch.testing.assert_close(probability.double(), expected[range(5), best], atol=1e-7, rtol=1e-5)


def test_strided_rows_and_infinities(device):
    logits = random_tensor(3, 2, 60, dtype=torch.float32, device=device)[:, 1]
    logits[0, :59] = float("-inf")
    mine, theirs = (confidence(logits, impl=impl) for impl in ("triton", "reference"))
    assert mine[0].equal(theirs[0]) and mine[0][0] == 59
    torch.testing.assert_close(mine[1], theirs[1])


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="exclude 9 is not in a vocabulary of 9"):
        confidence(torch.zeros(2, 9), exclude=9)
    with pytest.raises(ValueError, match=r"floating \(rows, vocabulary\)"):
        confidence(torch.zeros(2, 9, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32, 256])
def test_full_size(rows, dtype, device):
    logits = random_tensor(rows, 152064, dtype=dtype, device=device) * 4
    token, probability = confidence(logits, exclude=151665)
    expected = confidence(logits.double(), exclude=151665, impl="reference")
    assert token.equal(expected[0])
    torch.testing.assert_close(probability, expected[1], atol=1e-7, rtol=1e-5)
