"""Rope scaling on request."""

import pytest
import torch

from mage_tune.decode.context import extend_context
from mage_tune.lm import from_backbone


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_longer_context_on_request(tiny_backbone, prompts, kind):
    lm = from_backbone(tiny_backbone(max_positions=64))
    (prompt,) = prompts((90,))
    with pytest.raises(ValueError, match="exceed the context of 64"):
        lm.generate(prompt, max_new_tokens=8)
    before = lm.logits(torch.tensor([prompt[:64]]))
    assert extend_context(lm.model, 2.0, kind) == 128
    after = lm.logits(torch.tensor([prompt[:64]]))
    assert len(lm.generate(prompt, max_new_tokens=8, stop_ids=()).tokens) == 8
    assert (after - before).abs().max() > 1e-4
    if kind == "linear":  # positions are halved, so two tokens now lie one apart
        inverse = lm.model.model.rotary_emb.inv_freq
        assert torch.allclose(inverse[0] * 2, torch.ones(()))
    with pytest.raises(ValueError, match="scaled already"):
        extend_context(lm.model, 2.0)


@pytest.mark.parametrize(
    ("factor", "kind", "message"),
    [(1.0, "yarn", "does not extend"), (2.0, "dynamic", "unknown rope scaling 'dynamic'")],
)
def test_refuses(tiny_backbone, factor, kind, message):
    with pytest.raises(ValueError, match=message):
        extend_context(tiny_backbone().model, factor, kind)
