"""A merged checkpoint: file for file what its base is, in its base's precision, whole or not at all."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mage_tune.backbone import load_backbone, write_family
from mage_tune.lm import load
from mage_tune.publish.merge import INDEX, merge

AUTHORS_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

class Fast_dLLM_QwenConfig(Qwen2Config):
    model_type = "Fast_dLLM_Qwen"

class Fast_dLLM_QwenForCausalLM(Qwen2ForCausalLM):
    config_class = Fast_dLLM_QwenConfig

class SDARConfig(Qwen3Config):
    model_type = "sdar"

class SDARForCausalLM(Qwen3ForCausalLM):
    config_class = SDARConfig
"""
"""Stands for the official modelling files, which are not ours to ship: their classes, weight names and config keys are
those of the official repositories, and the fixtures' weights were saved by them."""

PUBLISHED = {
    "fast_dllm_v2": {
        "model_type": "Fast_dLLM_Qwen",
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling.Fast_dLLM_QwenConfig",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        "bd_size": 8,
        "conplemenrary_mask": True,
        "pad_token_id": 0,
        "eos_token_id": 3,
        "transformers_version": "4.53.1",
    },
    "sdar": {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "auto_map": {"AutoConfig": "modeling.SDARConfig", "AutoModelForCausalLM": "modeling.SDARForCausalLM"},
        "fuse_cross_entropy": True,
        "micro_forward": False,
        "rope_scaling": None,
        "use_cache": False,
        "eos_token_id": 3,
        "tie_word_embeddings": False,
        "transformers_version": "4.52.4",
    },
    "converted": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
}
"""What the authors' config.json says beside sizes."""

BESIDE = {
    "generation_config.json": '{"eos_token_id": [3], "temperature": 0.6}',
    "LICENSE": "Apache License",
    "chat_template.jinja": "{{ messages }}",
    "notes.md": "not of the layout",
    "optimizer.bin": "nor this",
}
IDS = torch.arange(4, 36).view(2, 16)


def lay_out(folder: Path, name: str, tensors: dict, config: dict, dtype: str = "bfloat16") -> Path:
    """A checkpoint as its authors publish it: two shards, one tensor of another precision, code and more beside it."""
    folder.mkdir()
    tensors = {key: value.to(getattr(torch, dtype)) for key, value in tensors.items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    names = sorted(tensors, reverse=True)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / shard, metadata={"format": "pt"})
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=3))
    told = config | PUBLISHED[name] | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(told))
    for file, text in BESIDE.items():
        (folder / file).write_text(text)
    if "auto_map" in told:
        (folder / "modeling.py").write_text(AUTHORS_CODE)
    return folder


@pytest.fixture
def make_base(published, tiny_backbone, converted_checkpoint, tmp_path):
    """make_base(family, dtype) -> a published checkpoint."""

    def make(name: str, dtype: str = "bfloat16") -> Path:
        if name == "converted":
            source = converted_checkpoint(tiny_backbone())
            config = json.loads((source / "config.json").read_text())
        else:
            source = published(name).folder
            config = published(name).facts["config"] | {"rms_norm_eps": 1e-6}
        return lay_out(tmp_path / "base", name, load_file(source / "model.safetensors"), config, dtype)

    return make


@pytest.fixture
def make_adapter(tiny_adapter, tmp_path):
    """make_adapter(base, **options) -> the folder of an adapter on it."""

    def make(base: Path, **options) -> Path:
        given = {} if "llama" in (base / "config.json").read_text() else {"mask_id": 95, "stop_ids": (3,), "pad_id": 0}
        backbone = load_backbone(str(base), dtype="float32", **given)
        tiny_adapter(backbone, **options).save_pretrained(str(tmp_path / "adapter"))
        write_family(tmp_path / "adapter", backbone.family)
        return tmp_path / "adapter"

    return make


def headers(file: Path) -> tuple:
    """Names, precisions, shapes and metadata of a safetensors file, in the order that it is read."""
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        return stored.metadata(), {name: (t.get_dtype(), t.get_shape()) for name, t in tensors.items()}


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_merged_folder_is_the_bases_file_for_file(family, make_base, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = make_base(family)
    adapter = make_adapter(base, train_mask_embedding=family == "converted")
    out = merge(adapter, tmp_path / "merged", str(base))

    kept = {file.name for file in base.iterdir()} - {"notes.md", "optimizer.bin"}
    assert {file.name for file in out.iterdir()} == kept | {"merge.json"}
    for name in kept - {"config.json"}:
        if name.endswith(".safetensors"):
            assert headers(out / name) == headers(base / name)
            assert (out / name).read_bytes() != (base / name).read_bytes()
        else:
            assert (out / name).read_bytes() == (base / name).read_bytes()
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (out, base))
    assert config.pop("mage_tune")["family"] == family
    original.pop("mage_tune", None)  # a converted base has family facts already
    assert config == original
    assert list(config) == list(original)

    attached = load(base, adapter=adapter, dtype="float32")
    merged = load(out, dtype="float32")
    assert merged.family == attached.family
    report = json.loads((out / "merge.json").read_text())
    assert 0 < report["mean_logit_difference"] < report["mean_adapter_effect"] / 20
    difference = (merged.logits(IDS) - attached.logits(IDS)).abs()
    assert difference.mean() < report["mean_adapter_effect"] / 20
    official: PreTrainedModel = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="float32")
    if family != "converted":
        assert type(official).__module__.endswith(".modeling")
    with torch.no_grad():
        assert torch.equal(official(input_ids=IDS).logits, merged.model(input_ids=IDS).logits)


def test_precision_is_the_bases_and_the_difference_is_told(make_base, make_adapter, tmp_path):
    base = make_base("fast_dllm_v2", "float32")
    adapter = make_adapter(base)
    exact = json.loads((merge(adapter, tmp_path / "exact", str(base)) / "merge.json").read_text())
    assert (exact["saved_in"], exact["merged_in"], exact["tokens"]) == ("float32", "float32", 32)
    assert 0 < exact["mean_logit_difference"] < exact["max_logit_difference"] < 1e-4
    (tmp_path / "base").rename(tmp_path / "exact-base")
    rounded = json.loads((merge(adapter, tmp_path / "half", str(make_base("fast_dllm_v2"))) / "merge.json").read_text())
    assert rounded["saved_in"] == "bfloat16"
    assert rounded["mean_logit_difference"] > 100 * exact["mean_logit_difference"]
    assert exact["mean_adapter_effect"] > 0.1


def test_an_adapter_that_rounding_would_lose_is_refused(make_base, make_adapter, tmp_path):
    base = make_base("fast_dllm_v2")
    adapter = make_adapter(base)
    weights = load_file(adapter / "adapter_model.safetensors")
    faint = {name: 1e-3 * value if "lora_B" in name else value for name, value in weights.items()}
    save_file(faint, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"rounding to the base's precision loses what was trained; publish the adap"):
        merge(adapter, tmp_path / "merged", str(base))
    assert not (tmp_path / "merged").exists()


def test_a_tokenizer_of_the_runs_own_wins(make_base, make_adapter, tmp_path):
    base = make_base("fast_dllm_v2")
    adapter = make_adapter(base)
    (adapter / "chat_template.jinja").write_text("{{ changed }}")
    out = merge(adapter, tmp_path / "merged", str(base))
    assert (out / "chat_template.jinja").read_text() == "{{ changed }}"


def test_a_quantised_base_is_refused(make_base, make_adapter, tmp_path):
    base = make_base("fast_dllm_v2")
    adapter = make_adapter(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    line = r"stored quantised \(bitsandbytes\), and a merge needs full precision; name the checkpoint it was made from"
    with pytest.raises(ValueError, match=line):
        merge(adapter, tmp_path / "merged", str(base))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_trained_on_four_bits_merges_into_the_full_precision_base(make_base, tiny_adapter, tmp_path):
    """What a QLoRA run leaves behind: the weights are those of the published base, never of its 4-bit copy."""
    pytest.importorskip("bitsandbytes")
    base = make_base("fast_dllm_v2", "float32")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    known = load_backbone(str(base), mask_id=95, stop_ids=(3,), pad_id=0)
    config = Qwen2Config.from_pretrained(base)
    model = Qwen2ForCausalLM.from_pretrained(base, config=config, quantization_config=nf4, device_map={"": "cpu"})
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    trained = tiny_adapter(replace(known, model=model)).train()  # in eval mode some CPUs repack it, 32 rows at a time
    trained.save_pretrained(str(tmp_path / "adapter"))
    write_family(tmp_path / "adapter", known.family)
    out = merge(tmp_path / "adapter", tmp_path / "merged", str(base))
    report = json.loads((out / "merge.json").read_text())
    assert report["max_logit_difference"] < 1e-4 < report["mean_adapter_effect"] / 100
    merged = load(out).model
    before, after = (
        torch.cat([load_file(file)[name] for file in sorted(folder.glob("*.safetensors")) if name in load_file(file)])
        for folder in (base, out)
        for name in ["model.layers.1.mlp.up_proj.weight"]
    )
    lora = {name.split("lora_")[1][0]: w for name, w in trained.named_parameters() if "1.mlp.up_proj.lora" in name}
    torch.testing.assert_close(after - before, 2.0 * lora["B"].detach() @ lora["A"].detach(), rtol=0, atol=1e-6)
    with torch.no_grad():  # near what it was trained with, and not that: four bits are coarse
        quantised = (trained(input_ids=IDS).logits - merged(input_ids=IDS).logits).abs().mean()
    assert report["mean_logit_difference"] * 10 < quantised < report["mean_adapter_effect"]


def test_weights_under_other_names_are_refused(make_base, make_adapter, tmp_path):
    base = make_base("fast_dllm_v2")
    adapter = make_adapter(base)
    for file in base.glob("*.safetensors"):  # as saved from the model without its head
        tensors = {name.removeprefix("model."): value for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    index = (base / INDEX).read_text()
    (base / INDEX).write_text(re.sub(r'"model\.(?!safe|0)', '"', index))
    with pytest.raises(
        ValueError, match=r"call the weight model\.\S+ by another name, so it cannot be merged into them"
    ):
        merge(adapter, tmp_path / "merged", str(base))


def test_what_is_no_adapter_is_refused(make_base, tmp_path):
    with pytest.raises(ValueError, match=r"base: no adapter_config.json there, so it is no adapter$"):
        merge(make_base("sdar"), tmp_path / "merged")


def test_an_interrupted_merge_leaves_nothing(make_base, make_adapter, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    base = make_base("sdar")
    adapter = make_adapter(base)
    monkeypatch.setattr("mage_tune.publish.merge.compare", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "merged", str(base))
    assert sorted(tmp_path.iterdir()) == before
