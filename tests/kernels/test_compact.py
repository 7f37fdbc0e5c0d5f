"""Compaction copies exactly the rows meant, and nothing else."""

import pytest
import torch

from mage_kernels.compact import compact
from mage_kernels.testing import random_tensor

LAYERS, BATCH, HEADS, CAPACITY, DIM, SLOTS, OWN = 2, 2, 3, 50, 24, 7, 4


def make(dtype, device):
    key, value = (
        random_tensor(LAYERS, BATCH, HEADS, CAPACITY, DIM, dtype=dtype, device=device, seed=s) for s in (0, 1)
    )
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(CAPACITY, (LAYERS, BATCH, HEADS, SLOTS), generator=generator, dtype=torch.int32)
    index[..., 1] = index[..., 0]  # a duplicate
    count = torch.tensor([[7, 0, 3], [1, 7, 2]], dtype=torch.int32).repeat(LAYERS, 1, 1)
    return key, value, index.to(device), count.to(device)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_copies_the_rows_meant(impl, dtype, device):
    key, value, index, count = make(dtype, device)
    out = [torch.full((LAYERS, BATCH, HEADS, SLOTS + OWN, DIM), 7.0, dtype=dtype, device=device) for _ in range(2)]
    compact(key, value, index, count, *out, impl=impl)
    for place in torch.cartesian_prod(*map(torch.arange, (LAYERS, BATCH, HEADS))).tolist():
        at = tuple(place)
        for cache, buffer in zip((key, value), out, strict=True):
            meant = int(count[at])
            assert buffer[at][:meant].equal(cache[at][index[at][:meant].long()])
            assert (buffer[at][meant:] == 7.0).all()


def test_strided_and_single_layer(device):
    key, value, index, count = make(torch.float16, device)
    buffers = torch.zeros(2, BATCH, SLOTS + OWN, HEADS, DIM, dtype=torch.float16, device=device)
    compact(key[1], value[1], index[1], count[1], *buffers.transpose(2, 3), impl="triton")
    expected = torch.zeros(2, BATCH, HEADS, SLOTS + OWN, DIM, dtype=torch.float16, device=device)
    compact(key[1], value[1], index[1], count[1], *expected, impl="reference")
    assert buffers.transpose(2, 3).equal(expected)


def test_buffers_must_be_large_enough(device):
    key, value, index, count = make(torch.float16, device)
    small = torch.zeros(LAYERS, BATCH, HEADS, SLOTS - 1, DIM, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="7 keys do not fit in buffers of 6 slots"):
        compact(key, value, index, count, small, small.clone())
    with pytest.raises(ValueError, match=r"out_key is torch\.float32"):
        compact(key, value, index[..., :3].contiguous(), count, small.float(), small.float())


@pytest.mark.gpu
def test_full_size(device):
    key, value = (random_tensor(28, 2, 4, 131072 // 8 + 3, 128, dtype=torch.bfloat16, device=device) for _ in range(2))
    index = torch.randint(key.shape[3], (28, 2, 4, 512), dtype=torch.int32, device=device)
    count = torch.randint(513, (28, 2, 4), dtype=torch.int32, device=device)
    mine, theirs = ([torch.zeros(28, 2, 4, 544, 128, dtype=torch.bfloat16, device=device)] * 2 for _ in range(2))
    compact(key, value, index, count, *mine, impl="triton")
    compact(key, value, index, count, *theirs, impl="reference")
    assert all(a.equal(b) for a, b in zip(mine, theirs, strict=True))
