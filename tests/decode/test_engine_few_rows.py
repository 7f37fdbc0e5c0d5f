"""Widths as real models have them, multiples of 64: the engine's products of a few rows take part."""

import pytest

from mage_tune.decode.engine import forward
from mage_tune.decode.engine.generate import generate

ARCHITECTURES = {"converted": "llama", "fast_dllm_v2": "qwen2", "sdar": "qwen3"}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_several_rows_at_once(tiny_lm, prompts, monkeypatch, family):
    lm = tiny_lm(family, block_size=8, architecture=ARCHITECTURES[family], hidden_size=64, intermediate_size=64)
    rows = []
    product = forward.linear
    monkeypatch.setattr(forward, "linear", lambda x, w, **how: rows.append(len(x)) or product(x, w, **how))
    whole, options = prompts((21, 3, 16)), {"max_new_tokens": 18, "stop_ids": (), "attention": "mage", "budget": 12}
    assert generate(lm, whole, **options).tokens == lm.generate(whole, **options).tokens
    assert 1 in rows and 24 in rows, "prompts one by one, blocks together"
