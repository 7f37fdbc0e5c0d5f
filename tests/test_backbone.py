"""Checkpoints in native classes, the attention hook, adapters, and what is written beside them."""

import json

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mage_tune.backbone import (
    attach_adapter,
    causal_lm,
    check_facts,
    hidden_states,
    load_backbone,
    load_tokenizer,
    output_head,
    random_backbone,
    read_family,
    resolve_dtype,
    write_family,
)
from mage_tune.blocks import StreamLayout
from mage_tune.data.tokenizer import byte_tokenizer
from mage_tune.families import CONVERTED, SDAR
from mage_tune.lm import load
from mage_tune.publish.merge import merge
from mage_tune.streams import RowStreams, StreamAttention

LENGTH, SIZE = 16, 4


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.fixture
def ids():
    return torch.randint(4, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(len(ids), -1)


def block_causal(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits of any transformers model under a 4-D block-causal mask: no code of ours but the mask."""
    mask = StreamLayout(0, ids.shape[1], SIZE).dense_mask()[None, None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


# --- the hook --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_without_attend_the_model_is_an_ordinary_causal_lm(tiny_backbone, ids, architecture):
    ours = tiny_backbone(architecture=architecture).model
    plain = type(ours)(ours.config.__class__.from_dict(ours.config.to_dict())).eval()
    plain.load_state_dict(ours.state_dict())
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
        padding = torch.ones_like(ids)
        padding[:, :3] = 0
        close(
            ours(input_ids=ids, attention_mask=padding).logits[:, 3:],
            plain(input_ids=ids, attention_mask=padding).logits[:, 3:],
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_hook_equals_transformers_under_the_same_mask(tiny_backbone, ids, architecture):
    model = tiny_backbone(architecture=architecture).model
    attention = StreamAttention(RowStreams(LENGTH, SIZE, noisy=0))
    with torch.no_grad():
        hidden = hidden_states(model, ids, positions(ids), attention.attend)
    close(output_head(model)(hidden), block_causal(model, ids))


def test_attend_sees_queries_after_the_rotation(tiny_backbone, ids):
    model = tiny_backbone().model
    seen: dict[int, tuple[Tensor, ...]] = {}

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        seen[layer] = (query, key, value, torch.tensor(scaling))
        return torch.zeros_like(query)

    with torch.no_grad():
        hidden_states(model, ids, positions(ids), attend)
        block = model.model.layers[0]
        inputs = block.input_layernorm(model.model.embed_tokens(ids))
        q, k, v = (
            projection(inputs).view(2, LENGTH, -1, 8).transpose(1, 2)
            for projection in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(inputs, positions(ids)))
    assert sorted(seen) == [0, 1, 2]
    for ours, expected in zip(seen[0], (q, k, v, torch.tensor(8**-0.5)), strict=True):
        close(ours, expected, 1e-6)


def test_positions_are_the_callers(tiny_backbone, ids):
    """Streams restart their positions: the second half at positions 0.. is the first half again."""
    model = tiny_backbone().model
    row = RowStreams(LENGTH, SIZE, noisy=1)
    with torch.no_grad():
        hidden = hidden_states(model, ids.repeat(1, 2), positions(ids).repeat(1, 2), StreamAttention(row).attend)
    # With nothing masked a noisy block sees what its clean twin sees.
    close(hidden[:, :LENGTH], hidden[:, LENGTH:])


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "native"), [("fast_dllm_v2", Qwen2ForCausalLM), ("sdar", Qwen3ForCausalLM)])
def test_published_checkpoints_load_into_native_classes(published, name, native):
    backbone = load_backbone(str(published(name).folder), mask_id=95, stop_ids=(3,), pad_id=0)
    assert type(backbone.model) is native
    assert backbone.model.dtype == torch.float32
    assert not backbone.model.training
    assert backbone.tokenizer is None
    head_dim = published(name).facts["config"].get("head_dim", 12)
    frequencies = 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim)  # buffers that no checkpoint holds
    close(backbone.model.model.rotary_emb.inv_freq, frequencies, 1e-7)


def test_a_broken_tokenizer_is_an_error_not_a_missing_one(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), LlamaConfig()) is not None
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="its tokenizer does not load"):
        load_tokenizer(str(tmp_path), LlamaConfig())


def test_a_converted_checkpoint_tells_everything_itself(tiny_backbone, converted_checkpoint, ids):
    backbone = tiny_backbone(block_size=SIZE)
    lm = load(converted_checkpoint(backbone))
    assert lm.family == backbone.family
    close(lm.logits(ids), block_causal(backbone.model, ids))


def test_keyword_facts_win_over_the_checkpoint(tiny_backbone, converted_checkpoint):
    folder = converted_checkpoint(tiny_backbone())
    family = load(folder, block_size=8, mask_id=5, stop_ids=(6, 7), pad_id=2).family
    assert (family.block_size, family.mask_id, family.stop_ids, family.pad_id) == (8, 5, (6, 7), 2)


def test_a_family_can_be_named_for_a_base_that_knows_nothing_of_blocks(tiny_backbone, tmp_path):
    tiny_backbone().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot tell the block-diffusion family from model_type 'llama'"):
        load(tmp_path)
    with pytest.raises(ValueError, match="mask token's id is unknown"):
        load(tmp_path, family="converted", stop_ids=(1,))
    assert load(tmp_path, family="converted", mask_id=63, stop_ids=(1,)).family.block_size == CONVERTED.block_size


def test_weights_that_do_not_fit_are_refused(published, tmp_path):
    source = published("sdar").folder
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fit Qwen3ForCausalLM"):
        load(tmp_path, mask_id=95, stop_ids=(3,))


def test_an_architecture_without_a_native_class_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="cannot load model_type 'gpt2' as family 'converted'"):
        load(tmp_path, family="converted")


def test_facts_outside_the_vocabulary_are_refused():
    facts = {"mask_id": 63, "stop_ids": (1,), "pad_id": 0}
    assert check_facts(CONVERTED.with_overrides(**facts), 64, "here").pad_id == 0
    for wrong in ({"mask_id": 64}, {"stop_ids": (1, 64)}):
        with pytest.raises(ValueError, match="64 is outside the vocabulary of 64"):
            check_facts(CONVERTED.with_overrides(**facts | wrong), 64, "here")
    with pytest.raises(ValueError, match="no stop token"):
        check_facts(CONVERTED.with_overrides(mask_id=63), 64, "here")


def test_random_weights_depend_on_the_seed_alone(tiny_backbone):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (tiny_backbone(seed=seed).model.model.embed_tokens.weight for seed in (3, 3, 4))
    assert torch.get_rng_state().equal(before)
    assert one.equal(same)
    assert not one.equal(other)


def test_random_models_with_room_for_bytes_read_text(tiny_backbone):
    shape = tiny_backbone().model.config
    backbone = random_backbone(
        {"architecture": "llama", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 32, "num_layers": 1,
         "num_heads": 4, "num_kv_heads": 2, "head_dim": None, "tie_embeddings": True, "max_positions": 64},
        "converted", device="cpu",
    )  # fmt: skip
    assert shape.vocab_size == 64
    assert backbone.tokenizer.decode(backbone.tokenizer("héllo")["input_ids"]) == "héllo"
    assert backbone.family.mask_id == backbone.tokenizer.mask_token_id


def test_precision_follows_the_device():
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", "cuda") == torch.bfloat16
    assert resolve_dtype("float16", "cpu") == torch.float16


# --- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_float32_on_a_frozen_model(tiny_backbone):
    backbone = tiny_backbone()
    backbone.model.to(torch.bfloat16)
    model = attach_adapter(backbone, rank=3, alpha=6, train_mask_embedding=True)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_" in name for name in trainable) == 2 * 7 * 3  # A and B of seven projections in three layers
    assert len(trainable) == 2 * 7 * 3 + 1  # and the mask row
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.shape[0] for name, p in trainable.items() if "lora_A" in name} == {3}


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_something(tiny_backbone, tiny_adapter, ids):
    plain = block_causal(tiny_backbone().model, ids)
    close(block_causal(attach_adapter(tiny_backbone(), rank=4, alpha=8), ids), plain, 0.0)
    assert not block_causal(tiny_adapter(tiny_backbone()), ids).allclose(plain, atol=1e-2)


def test_targets_and_the_mask_row_can_be_chosen(tiny_backbone, ids):
    backbone = tiny_backbone()
    model = attach_adapter(backbone, rank=2, alpha=2, targets=["q_proj"], train_mask_embedding=True)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("q_proj.lora" in name for name in trainable) == 6
    (row,) = [name for name in trainable if "lora" not in name]
    before = block_causal(model, torch.full_like(ids, backbone.family.mask_id))
    with torch.no_grad():
        model.get_parameter(row).add_(0.5)
    assert not block_causal(model, torch.full_like(ids, backbone.family.mask_id)).allclose(before, atol=1e-2)
    assert len(model.get_parameter(row)) == 1


class SentFromLists(TorchDispatchMode):
    """Counts tensors made of Python's numbers: on a GPU the host waits for each until the device has nothing to do."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_not_sent_to_the_device_in_every_pass(tiny_backbone, tiny_adapter, ids, tied):
    backbone = tiny_backbone(tie_embeddings=tied)
    model = tiny_adapter(backbone, train_mask_embedding=True)
    ids[:, 0] = backbone.family.mask_id

    def states() -> Tensor:
        attend = StreamAttention(RowStreams(LENGTH // 2, SIZE)).attend
        return output_head(model)(hidden_states(model, ids, positions(ids), attend))

    with torch.inference_mode():  # what is made here must be of use to a pass that trains
        states()
    with SentFromLists() as sent:
        states().sum().backward()
    assert sent.count == 0
    (row,) = [p for name, p in model.named_parameters() if "trainable_tokens" in name]
    assert row.grad.abs().max() > 0


def test_training_can_start_from_an_adapter(tiny_backbone, tiny_adapter, tmp_path, ids):
    trained = tiny_adapter(tiny_backbone())
    trained.save_pretrained(str(tmp_path / "adapter"))
    again = attach_adapter(tiny_backbone(), rank=9, alpha=1, init_from=str(tmp_path / "adapter"))
    close(block_causal(again, ids), block_causal(trained, ids))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in trained.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("train_mask_embedding", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_plain_peft_loads_an_adapter_and_gives_our_logits(
    tiny_backbone, tiny_adapter, converted_checkpoint, tmp_path, ids, tied, train_mask_embedding
):
    base = converted_checkpoint(tiny_backbone(tie_embeddings=tied))
    trained = tiny_adapter(load_backbone(str(base)), train_mask_embedding=train_mask_embedding)
    trained.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.cat([ids[:, :8], torch.full((2, 8), 63)], dim=1)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")).eval()
    ours = load(base, adapter=tmp_path / "adapter")
    close(ours.logits(ids), block_causal(plain, ids))
    assert not ours.logits(ids).allclose(load(base).logits(ids), atol=1e-2)


def test_family_facts_survive_beside_an_adapter(tmp_path):
    family = SDAR.with_overrides(block_size=8, mask_id=63, stop_ids=(1, 2), pad_id=0)
    write_family(tmp_path, family)
    assert read_family(tmp_path) == family
    assert read_family(tmp_path / "nowhere") is None


def test_an_adapter_is_used_with_the_blocks_it_was_trained_with(
    tiny_backbone, tiny_adapter, converted_checkpoint, tmp_path
):
    base = converted_checkpoint(tiny_backbone(block_size=4))
    folder = tmp_path / "adapter"
    tiny_adapter(load_backbone(str(base))).save_pretrained(str(folder))
    trained_with = load(base, block_size=8, stop_ids=(2,)).family
    write_family(folder, trained_with)
    assert load(base, adapter=folder).family == trained_with
    assert load(base, adapter=folder, block_size=2).family.block_size == 2


@pytest.mark.parametrize("train_mask_embedding", [False, True])
def test_a_merged_adapter_equals_the_attached_one(
    tiny_backbone, tiny_adapter, converted_checkpoint, tmp_path, ids, train_mask_embedding
):
    base = converted_checkpoint(tiny_backbone())
    backbone = load_backbone(str(base), block_size=8)
    model = tiny_adapter(backbone, train_mask_embedding=train_mask_embedding)
    model.save_pretrained(str(tmp_path / "adapter"))
    write_family(tmp_path / "adapter", backbone.family)
    merged = load(merge(tmp_path / "adapter", tmp_path / "merged", base=str(base)))
    attached = load(base, adapter=tmp_path / "adapter")
    assert merged.family == attached.family == backbone.family
    close(merged.logits(ids), attached.logits(ids))
    with pytest.raises(ValueError, match="exists already"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_merging_without_family_facts_leaves_nothing_behind(tiny_backbone, tiny_adapter, tmp_path):
    tiny_adapter(tiny_backbone()).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="its family is unknown"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_the_model_is_found_inside_wrappers(tiny_backbone, tiny_adapter):
    backbone = tiny_backbone()
    model = tiny_adapter(backbone)
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert causal_lm(wrapped) is causal_lm(model) is backbone.model
    with pytest.raises(TypeError, match="no transformers model inside Linear"):
        causal_lm(torch.nn.Linear(1, 1))
