"""On a GPU decoding writes what it writes on a CPU."""

from dataclasses import replace

import pytest
import torch

from mage_tune.lm import BlockDiffusionLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]
VARIANTS = [
    {},
    {"attention": "mage", "residual": True, "refresh": "union"},
    {"attention": "mage-v1"},
    {"attention": "quest", "sub_block": 4, "block_cache": True},
    {"attention": "tidal", "rule_options": {"correction_layer": 2}},
    {"attention": "oracle", "acceptance": "entropy"},
    {"attention": "sparsed", "temperature": 1.0, "top_p": 0.9, "top_k": 9},
    {"attention": "sparse-dllm"},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_equals_the_cpu(tiny_lm, prompts, options):
    lm = tiny_lm(dtype=torch.float64, block_size=8, num_layers=4)
    batch = prompts((40, 3, 17))
    common = {"max_new_tokens": 19, "budget": 12, "dense_layers": 1, "stop_ids": ()}
    expected = lm.generate(batch, **common, **options)
    try:
        on_gpu = BlockDiffusionLM(lm.model.cuda(), lm.tokenizer, lm.family)
        got = on_gpu.generate(batch, **common, **options)
        assert [replace(r, keys_kept=None) for r in got.rows] == [replace(r, keys_kept=None) for r in expected.rows]
        # A mean over layers, whose rounding may differ where a rule gives each layer its own budget (mage-v1).
        assert [r.keys_kept for r in got.rows] == pytest.approx([r.keys_kept for r in expected.rows])
    finally:
        lm.model.cpu()
