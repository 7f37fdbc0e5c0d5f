"""Who runs, and that a kernel that cannot run says why."""

import logging

import pytest
import torch

from mage_kernels import choice
from mage_kernels.exact_attention import exact_attention
from mage_kernels.small_attention import small_attention


def attend(dtype, device, dim=16, grad=False, **kwargs):
    x = torch.zeros(1, 1, 4, dim, dtype=dtype, device=device, requires_grad=grad)
    return exact_attention(x, x, x, torch.ones(1, dtype=torch.int32, device=device), 1.0, **kwargs)


def test_unknown_implementation(device):
    with pytest.raises(ValueError, match="impl 'cuda' is none of auto, triton, reference"):
        attend(torch.float16, device, impl="cuda")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "it computes in bf16 and fp16, not in torch.float64"),
        ({"dim": 264}, "head_dim 264 is over 256"),
        ({"grad": True}, "it has no backward"),
    ],
)
def test_the_reason_is_given(change, reason, device):
    with pytest.raises(RuntimeError, match=f"exact_attention: impl='triton' cannot run: {reason}"):
        attend(**{"dtype": torch.float16, "device": device} | change, impl="triton")
    assert attend(**{"dtype": torch.float16, "device": device} | change, impl="auto").out.isfinite().all()


def test_auto_logs_its_choice_once(device, caplog):
    choice._logged.clear()
    with caplog.at_level(logging.INFO, logger="mage_kernels"):
        for _ in range(2):
            attend(torch.float16, device)
            attend(torch.float64, device)
    assert caplog.messages == [
        "exact_attention: triton",
        "exact_attention: reference, because it computes in bf16 and fp16, not in torch.float64",
    ]


def test_without_the_interpreter_a_cpu_has_no_triton(device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="cannot run: the tensors are on cpu"):
        attend(torch.float16, "cpu", impl="triton")


def test_fake_tensors_have_the_shapes_of_real_ones(device):
    """What torch.compile and CUDA graphs rely on."""
    from mage_kernels.exact_attention.triton import _op
    from mage_kernels.small_attention.triton import small_attention as small

    x = torch.randn(2, 2, 5, 16, dtype=torch.float16, device=device)
    count = torch.tensor([3, 5], dtype=torch.int32, device=device)
    utilities = ("test_schema", "test_faketensor")
    masses = torch.empty(2, 2, 1, 5, device=device), torch.empty(2, 2, 5, device=device)
    torch.library.opcheck(_op, (x, x, x, count, 0.3, x, x, 0, 16, *masses, 0), test_utils=utilities)
    torch.library.opcheck(small, (x, x, x, count.repeat(2, 1), 0.3, 2, 5), test_utils=utilities)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_compiles_without_graph_breaks(impl, device):
    x = torch.randn(2, 2, 5, 16, dtype=torch.float16, device=device)
    count = torch.tensor([3, 5], dtype=torch.int32, device=device)

    def attend(q, n):
        masses = q.new_zeros(2, 2, 1, 5, dtype=torch.float32), q.new_zeros(2, 2, 5, dtype=torch.float32)
        out = exact_attention(q, q, q, n, 0.3, tile=16, masses=masses, impl=impl).out + masses[1][..., None].half()
        return small_attention(out, q, q, n.repeat(2, 1), 0.3, own=1, impl=impl)[0] + 1

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, count), attend(x, count))
