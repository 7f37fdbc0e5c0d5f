"""A whole step of one row, in the kernels that such a step has."""

import torch

from mage_tune.bench.checks import ALONE, check_model, tiny_lm


def test_steps_of_one_row_equal_the_plain_decoder(device, dtype):
    lm = tiny_lm("fast_dllm_v2", torch.device(device), dtype, **ALONE | {"intermediate_size": 640})
    checks = list(check_model("one row", lm, (160,), 128, impl="triton"))
    assert len(checks) >= 3
    assert [check for check in checks if not check.is_fine] == []
