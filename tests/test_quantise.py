"""QLoRA: weights in 4 bits, and adapters that train on them as on the weights those bits stand for."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from mage_tune.backbone import attach_adapter, hold_in_nf4, random_backbone
from mage_tune.data.collate import Collator
from mage_tune.fused import fuse
from mage_tune.lm import load
from mage_tune.recipe_schema import Objective
from mage_tune.stream_loss import StreamLoss

bnb = pytest.importorskip("bitsandbytes")

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "architecture": "qwen2"}
OBJECTIVE = Objective.model_validate({"diffusion": {"weight": 1.0}, "query_alignment": {"weight": 1.0}})


@pytest.fixture
def quantised(tiny_backbone):
    """quantised() -> (a backbone in 4 bits, the same with the weights that those stand for)."""

    def make():
        ours, like = tiny_backbone(**WIDE), tiny_backbone(**WIDE)
        hold_in_nf4(ours.model, torch.device("cpu"))
        for name, linear in like.model.model.layers.named_modules():
            if isinstance(linear, nn.Linear):
                weight = ours.model.model.layers.get_submodule(name).weight
                whole = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
                linear.weight.data = whole.to(linear.weight.dtype)
        return ours, like

    return make


def test_linear_layers_take_half_a_byte_a_weight_and_nothing_else_changes(tiny_backbone, quantised):
    ours, _ = quantised()
    held = [m for m in ours.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(held) == 7 * ours.model.config.num_hidden_layers
    for module in held:
        assert module.weight.quant_type == "nf4" and module.weight.quant_state.nested
        assert module.weight.numel() * 2 == module.in_features * module.out_features
    plain = tiny_backbone(**WIDE).model
    assert ours.model.lm_head.weight.equal(plain.lm_head.weight)
    assert ours.model.model.layers[0].self_attn.q_proj.bias.equal(plain.model.layers[0].self_attn.q_proj.bias)


def gradients(backbone, examples, change=lambda model: None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = attach_adapter(backbone, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    change(model)
    loss = StreamLoss(OBJECTIVE)
    batch = Collator(backbone.family, 0, **loss.collator_needs())(examples)
    sum(loss.sums(model.train(), batch).values()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found and all("lora" in name for name in found)
    return found


@pytest.mark.parametrize("recompute", [None, "nothing", "mlp", "layer"])
def test_adapters_train_as_on_the_weights_the_bits_stand_for(quantised, make_examples, recompute):
    ours, like = quantised()
    examples = make_examples((24, 3))
    expected = gradients(like, examples)
    found = gradients(ours, examples, (lambda m: fuse(m, recompute)) if recompute else lambda m: None)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_checkpoints_load_in_4_bits(tiny_backbone, converted_checkpoint):
    folder = converted_checkpoint(tiny_backbone(**WIDE))
    from mage_tune.backbone import load_backbone

    backbone = load_backbone(str(folder), dtype="float32", device="cpu", quantise="nf4")
    direct = load(folder, dtype="float32")
    ids = torch.randint(6, 60, (1, 8))
    apart = (backbone.model(input_ids=ids).logits - direct.model(input_ids=ids).logits).abs().mean()
    assert 0 < apart < 0.5 * direct.model(input_ids=ids).logits.abs().mean()


def test_without_bitsandbytes_the_error_says_what_to_install(tiny_backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install 'mage_tune\[gpu\]'"):
        hold_in_nf4(tiny_backbone(**WIDE).model, torch.device("cpu"))


def test_random_weights_are_made_on_their_device():
    shape = {
        "architecture": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "tie_embeddings": True, "max_positions": 512,
    }  # fmt: skip
    facts = {"mask_id": 63, "stop_ids": (1,), "pad_id": 0}
    backbone = random_backbone(shape, "converted", dtype="bfloat16", device="meta", **facts)
    assert {(p.device.type, p.dtype) for p in backbone.model.parameters()} == {("meta", torch.bfloat16)}
