"""A merged checkpoint: in the layout its base was published in, in its base's precision, whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mage_tune.backbone import load_backbone, merge, write_family
from mage_tune.lm import load

AUTHORS_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class Config(Qwen2Config):
    model_type = "Fast_dLLM_Qwen"

class Model(Qwen2ForCausalLM):
    config_class = Config
"""
"""Stands for the official modeling.py, which is not ours to ship."""


@pytest.fixture
def remote_base(published, tmp_path):
    """A Fast-dLLM v2 checkpoint as its authors publish it, remote code included."""
    folder = tmp_path / "base"
    folder.mkdir()
    source = published("fast_dllm_v2").folder
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (folder / "modeling.py").write_text(AUTHORS_CODE)
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    config = json.loads((source / "config.json").read_text()) | {"auto_map": auto_map, "architectures": ["Model"]}
    (folder / "config.json").write_text(json.dumps(config | {"bd_size": 4, "torch_dtype": "float32"}))
    return folder


@pytest.fixture
def adapter(remote_base, tiny_adapter, tmp_path):
    backbone = load_backbone(str(remote_base), mask_id=95, stop_ids=(3,), pad_id=0)
    tiny_adapter(backbone).save_pretrained(str(tmp_path / "adapter"))
    write_family(tmp_path / "adapter", backbone.family)
    return tmp_path / "adapter"


IDS = torch.arange(4, 36).view(2, 16)


def test_the_bases_layout_is_kept_and_both_sides_load_it(remote_base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = merge(adapter, tmp_path / "merged", str(remote_base))
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (out, remote_base))
    assert config.pop("mage_tune")["family"] == "fast_dllm_v2"
    assert config == original
    attached = load(remote_base, adapter=adapter)
    assert torch.allclose(load(out).logits(IDS), attached.logits(IDS), atol=1e-4)
    assert load(out).family == attached.family
    official: PreTrainedModel = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(official).__module__.endswith(".modeling")
    untuned = load(remote_base, mask_id=95, stop_ids=(3,), pad_id=0)
    with torch.no_grad():
        expected = attached.model(input_ids=IDS).logits
        assert torch.allclose(official(input_ids=IDS).logits, expected, atol=1e-4)
        assert not expected.allclose(untuned.model(input_ids=IDS).logits, atol=1e-2)


def test_precision_is_the_bases_and_the_difference_is_told(remote_base, adapter, tmp_path):
    exact = merge(adapter, tmp_path / "exact", str(remote_base))
    report = json.loads((exact / "merge.json").read_text())
    assert (report["saved_in"], report["merged_in"], report["tokens"]) == ("float32", "float32", 16)
    assert 0 < report["mean_logit_difference"] < report["max_logit_difference"] < 1e-4
    config = json.loads((remote_base / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (remote_base / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    half = merge(adapter, tmp_path / "half", str(remote_base))
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    rounded = json.loads((half / "merge.json").read_text())
    assert rounded["saved_in"] == "bfloat16"
    assert rounded["mean_logit_difference"] > 100 * report["mean_logit_difference"]
    assert "quantization_config" not in json.loads((half / "config.json").read_text())


def test_large_checkpoints_are_sharded(remote_base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("mage_tune.backbone.SHARD", "40KB")
    out = merge(adapter, tmp_path / "merged", str(remote_base))
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").is_file()
    attached = load(remote_base, adapter=adapter)
    assert torch.allclose(load(out).logits(IDS), attached.logits(IDS), atol=1e-4)


def test_an_interrupted_merge_leaves_nothing(remote_base, adapter, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mage_tune.backbone.remote_code", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "merged", str(remote_base))
    assert sorted(tmp_path.iterdir()) == before
