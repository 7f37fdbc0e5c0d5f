"""Generation against a decoder that recomputes everything under dense masks (conftest.brute_force)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TOGETHER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("converted", "exact"),
        ("converted", "mage"),
        ("converted", "oracle"),
        ("fast_dllm_v2", "exact"),
        ("sdar", "mage"),
    ],
)
@TOGETHER
@given(data=st.data())
def test_equals_brute_force(tiny_lm, brute_force, prompts, family, attention, data):
    block_size = data.draw(st.sampled_from([2, 4, 8]), "block size")
    lm = tiny_lm(family, torch.float64, block_size=block_size)
    lengths = data.draw(st.lists(st.integers(1, 26), min_size=1, max_size=3), "prompt lengths")
    batch = prompts(lengths, seed=data.draw(st.integers(0, 20), "seed"))
    new = data.draw(st.integers(1, 14), "new tokens")
    window = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if w <= block_size]), "sub-block")
    threshold = data.draw(st.sampled_from([0.3, 0.9, 1.0]), "threshold")
    budget = data.draw(st.integers(1, 20), "budget")
    dense_layers = data.draw(st.integers(0, 2), "dense layers")
    out = lm.generate(
        batch,
        max_new_tokens=new,
        threshold=threshold,
        sub_block=window,
        attention=attention,
        budget=budget,
        dense_layers=dense_layers,
    )
    for row, prompt in zip(out.rows, batch, strict=True):
        tokens, steps = brute_force(lm, prompt, new, threshold, window, attention, budget, dense_layers)
        assert row.tokens == tokens
        assert row.forwards["exact"] + row.forwards["sparse"] == steps
