"""When launches overlap. That they may is tested on the compiled code (`compile_ops.py`) and in the engine on a GPU."""

import pytest

from mage_kernels import overlap


@pytest.mark.parametrize("is_possible", [False, True])
def test_launches_overlap_where_asked_and_possible(monkeypatch, is_possible):
    monkeypatch.setattr(overlap, "is_possible", lambda: is_possible)
    alone = {"OVERLAP": False}
    assert overlap.launch_options() == alone
    with overlap.overlapping():
        assert overlap.launch_options() == ({"OVERLAP": True, "launch_pdl": True} if is_possible else alone)
    assert overlap.launch_options() == alone
