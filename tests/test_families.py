"""Every family against the outputs of its own official code (tests/fixtures), and what tells families apart."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import mage_tune.data.collate as collate
from mage_tune.backbone import hidden_states, output_head
from mage_tune.blocks import StreamLayout, draw_mask
from mage_tune.data.collate import Collator
from mage_tune.data.example import Example
from mage_tune.families import CONVERTED, FAMILIES, FAST_DLLM_V2, SDAR, apply_config, get_family, guess_family
from mage_tune.objectives import cross_entropy_sum
from mage_tune.streams import RowStreams, StreamAttention


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def whole_blocks(ids: Tensor, size: int) -> Tensor:
    return ids[:, : ids.shape[1] // size * size]


def gradient_norm(model: torch.nn.Module) -> Tensor:
    return torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fast_dllm_v2", "sdar"])
def test_logits_equal_the_official_ones(published, name):
    checkpoint = published(name)
    lm = checkpoint.load()
    assert lm.family.name == name
    assert lm.family.block_size == {"fast_dllm_v2": 8, "sdar": 4}[name]
    close(lm.logits(whole_blocks(checkpoint.data["ids"], lm.family.block_size)), checkpoint.data["logits_block_causal"])


@pytest.mark.parametrize("name", ["fast_dllm_v2", "sdar"])
def test_a_later_block_changes_no_earlier_logits(published, name):
    checkpoint = published(name)
    lm = checkpoint.load()
    size = lm.family.block_size
    ids = whole_blocks(checkpoint.data["ids"], size)
    before = lm.logits(ids)
    for start in range(size, ids.shape[1], size):
        changed = ids.clone()
        changed[:, start:] = (changed[:, start:] + 17) % 90
        after = lm.logits(changed)
        assert after[:, :start].equal(before[:, :start])
        assert not after[:, start:].allclose(before[:, start:], atol=1e-3)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 90  # inside a block everyone sees everyone
    assert not lm.logits(changed)[:, -size].allclose(before[:, -size], atol=1e-5)


@pytest.mark.parametrize("name", ["fast_dllm_v2", "sdar"])
def test_logits_of_a_prefix_are_a_prefix_of_the_logits(published, name):
    checkpoint = published(name)
    lm = checkpoint.load()
    size = lm.family.block_size
    ids = whole_blocks(checkpoint.data["ids"], size)
    padded = torch.cat([ids, torch.zeros(1, 3 * size, dtype=torch.int64)], dim=1)
    whole = lm.logits(ids)
    close(lm.logits(padded)[:, : ids.shape[1]], whole)
    for end in range(size, ids.shape[1], size):
        close(lm.logits(ids[:, :end]), whole[:, :end])


def test_logits_of_a_partial_block_are_refused(published):
    with pytest.raises(ValueError, match="whole number of blocks"):
        published("sdar").load().logits(torch.zeros(1, 5, dtype=torch.int64))


# --- Fast-dLLM v2's training step ------------------------------------------------------------------------------------


@pytest.fixture
def fast(published):
    """Its model with every parameter trainable, and the official training step."""
    checkpoint = published("fast_dllm_v2")
    lm = checkpoint.load()
    lm.model.requires_grad_(True)
    return lm, checkpoint.data


def official_masks(data: dict[str, Tensor], mask_id: int) -> list[np.ndarray]:
    half = data["train_labels"].shape[1]
    return [((row[:half] == mask_id) & (data["train_labels"][0] != -100)).numpy() for row in data["train_input_ids"]]


def test_fast_dllm_training_step_from_its_own_two_views(fast):
    lm, data = fast
    labels, ids = data["train_labels"][0], data["train_input_ids"]
    length = len(labels)
    streams = RowStreams(length, lm.family.block_size, noisy=1)
    positions = torch.arange(length).repeat(2).expand(2, -1)
    hidden = hidden_states(lm.model, ids, positions, StreamAttention(streams).attend)
    head = output_head(lm.model)
    close(head(hidden[:, :length]), data["train_logits"])

    masked = torch.from_numpy(np.stack(official_masks(data, lm.family.mask_id)))
    view, position = masked.nonzero(as_tuple=True)
    assert len(position) == (labels != -100).sum()  # complementary: every supervised token once
    loss = cross_entropy_sum(hidden[view, position - 1], head, labels[position], torch.ones(len(position)))
    loss = loss / len(position)
    close(loss, data["train_loss"][0])
    loss.backward()
    close(gradient_norm(lm.model), data["train_grad_norm"][0], 1e-4)


def test_fast_dllm_training_step_through_collator_and_shared_clean_stream(fast, monkeypatch):
    lm, data = fast
    labels, mask_id = data["train_labels"][0], lm.family.mask_id
    masks = official_masks(data, mask_id)
    monkeypatch.setattr(collate, "draw_mask", lambda maskable, *rest: (masks[0] & maskable, np.ones(len(maskable))))
    example = Example(0, data["ids"][0, : len(labels)].numpy(), (labels != -100).numpy().astype(np.float32))
    batch = Collator(lm.family, seed=0)([example])

    # [x_t1 ; x_t2 ; x_0]: the official two rows [x_t ; x_0] with their clean half shared.
    length = len(labels)
    first, second = data["train_input_ids"]
    assert batch["input_ids"][0].equal(torch.cat([first[:length], second[:length], second[length:]]))
    assert batch["position_ids"][0].equal(torch.arange(length).repeat(3))
    positions = [np.flatnonzero(m) for m in masks]
    assert batch["noisy_from"].tolist() == [p + view * length - 1 for view in (0, 1) for p in positions[view].tolist()]
    assert batch["noisy_target"].equal(labels[np.concatenate(positions)])
    assert batch["noisy_weight"].equal(torch.ones(len(batch["noisy_target"])))
    assert batch["loss_items"] == (labels != -100).sum()

    attention = StreamAttention(batch["streams"])
    hidden = hidden_states(lm.model, batch["input_ids"], batch["position_ids"], attention.attend).flatten(0, 1)
    head = output_head(lm.model)
    close(head(hidden[: 2 * length]).reshape(2, length, -1), data["train_logits"])
    loss = cross_entropy_sum(hidden[batch["noisy_from"]], head, batch["noisy_target"], batch["noisy_weight"])
    loss = loss / batch["loss_items"]
    close(loss, data["train_loss"][0])
    loss.backward()
    close(gradient_norm(lm.model), data["train_grad_norm"][0], 1e-4)


# --- SDAR's packed row -----------------------------------------------------------------------------------------------


def packed_lengths(positions: Tensor) -> list[int]:
    starts = [*positions.eq(0).nonzero().flatten().tolist(), len(positions)]
    return [end - start for start, end in pairwise(starts)]


def test_sdar_packed_attention_is_our_layout_per_sample(published):
    data = published("sdar").data
    lengths = packed_lengths(data["packed_position_ids"][0])
    assert torch.cat([torch.arange(n) for n in lengths]).equal(data["packed_position_ids"][0])
    ours = torch.block_diag(*[StreamLayout(1, n, SDAR.block_size).dense_mask() for n in lengths]).bool()
    assert ours.equal(data["packed_attention_mask"][0])


class GivenDraws:
    """A generator that hands out the draws of the official code."""

    def __init__(self, level: float, uniform: np.ndarray) -> None:
        self.level, self.draws = level, uniform

    def uniform(self, low: float, high: float, size: int) -> np.ndarray:
        return low + (high - low) * np.full(size, self.level)

    def random(self, size: int) -> np.ndarray:
        assert size == len(self.draws)
        return self.draws


def test_sdar_noise_from_the_official_draws(published):
    """Seed 3 reproduces the fixture: first a level per sample, then a number per token of the packed row."""
    data, mask_id = published("sdar").data, published("sdar").facts["mask_id"]
    lengths = packed_lengths(data["packed_position_ids"][0])
    generator = torch.Generator().manual_seed(3)
    levels = torch.rand(len(lengths), generator=generator)
    uniform = torch.rand(1, sum(lengths), generator=generator)[0].numpy()

    is_masked, p, start = [], [], 0
    for level, n in zip(levels.tolist(), lengths, strict=True):
        maskable = ~data["packed_prompt_mask"][0, start : start + n].numpy()
        # The official code redraws the whole packed row until one of its tokens is masked; our row is one sample.
        noise = replace(SDAR.noise, at_least_one=False)
        sample = draw_mask(maskable, noise, SDAR.block_size, GivenDraws(level, uniform[start : start + n]))
        is_masked.append(sample[0])
        p.append(sample[1])
        start += n
    is_masked, p = np.concatenate(is_masked), np.concatenate(p)
    assert is_masked.tolist() == data["packed_is_masked"][0].tolist()
    assert p[is_masked] == pytest.approx(data["packed_p"].numpy(), abs=1e-7)
    ids = whole_blocks(data["ids"], SDAR.block_size)[0].numpy()
    assert np.where(is_masked, mask_id, ids).tolist() == data["packed_noisy"][0].tolist()


def test_sdar_loss_weighs_by_inverse_p_and_divides_by_supervised_tokens():
    family = SDAR.with_overrides(mask_id=99, pad_id=0)
    weight = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1], dtype=np.float32)
    batch = Collator(family, seed=0)([Example(4, np.arange(10, 20), weight)])
    is_masked = batch["input_ids"][0, :12] == 99
    assert batch["loss_items"] == 9  # seven tokens and the two pads that fill the last block
    p = 1 / batch["noisy_weight"]
    assert p.equal(p[:1].expand_as(p))
    assert 1e-3 < p[0] <= 1
    assert batch["noisy_from"].equal(is_masked.nonzero()[:, 0])  # no shift


# --- telling families apart ------------------------------------------------------------------------------------------


def test_published_configs_are_recognised_and_their_facts_win():
    assert guess_family({"model_type": "Fast_dLLM_Qwen"}) == FAST_DLLM_V2
    assert guess_family({"model_type": "Fast_dLLM_Qwen", "bd_size": 16}).block_size == 16
    assert guess_family({"model_type": "sdar"}).block_size == 4
    sdar = guess_family({"model_type": "sdar", "block_size": 16, "mask_token_id": 7, "eos_token_id": 1})
    assert (sdar.block_size, sdar.mask_id, sdar.stop_ids) == (16, 7, SDAR.stop_ids)


def test_a_converted_config_carries_its_own_facts():
    ours = {"family": "converted", "block_size": 8, "mask_id": 0, "stop_ids": [2], "pad_id": 3}
    family = guess_family({"model_type": "llama", "eos_token_id": 9, "pad_token_id": 8, "mage_tune": ours})
    assert (family.block_size, family.mask_id, family.stop_ids, family.pad_id) == (8, 0, (2,), 3)


def test_a_published_family_saved_by_us_keeps_the_facts_it_was_trained_with():
    ours = {"family": "sdar", "block_size": 8, "mask_id": 6, "stop_ids": [2], "pad_id": 0}
    family = guess_family({"model_type": "qwen3", "eos_token_id": 9, "pad_token_id": 8, "mage_tune": ours})
    assert (family.block_size, family.mask_id, family.stop_ids, family.pad_id) == (8, 6, (2,), 0)


def test_a_converted_base_takes_stop_and_pad_from_its_config():
    family = apply_config(CONVERTED, {"eos_token_id": [5, 6], "pad_token_id": 4})
    assert (family.stop_ids, family.pad_id, family.mask_id) == ((5, 6), 4, None)


def test_unknown_families_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match="fast_dllm_v2, sdar, converted"):
        get_family("llada")
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        guess_family({"model_type": "gpt2"})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_records_keep_the_facts_of_families_md(family):
    block, shift, views, weight = {
        "fast_dllm_v2": (32, True, True, "uniform"),
        "sdar": (4, False, False, "inverse_p"),
        "converted": (32, True, False, "uniform"),
    }[family.name]
    assert (family.block_size, family.token_shift) == (block, shift)
    assert (family.complementary_views, family.loss_weight) == (views, weight)
    assert family.with_overrides(block_size=None) == family
