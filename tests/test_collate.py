"""Training rows: what is noised, what is trained, with which weight, and what never is."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mage_tune.blocks import TILE, all_mask_positions, draw_mask, noise_generator, round_up
from mage_tune.data.collate import NOISE_DRAW, Collator, length_bucket
from mage_tune.data.example import Example
from mage_tune.families import CONVERTED, FAST_DLLM_V2, SDAR, Family

SIZE, MASK, STOP, PAD = 4, 63, 1, 0
FACTS = {"block_size": SIZE, "mask_id": MASK, "stop_ids": (STOP,), "pad_id": PAD}
FAMILIES = [family.with_overrides(**FACTS) for family in (FAST_DLLM_V2, SDAR, CONVERTED)]
FAST, SDAR_4, CONVERTED_4 = FAMILIES


def everything_masked(family: Family) -> Family:
    return family.with_overrides(noise=replace(family.noise, low=1.0))


def example(weights: list[float], row: int = 0) -> Example:
    """Tokens 10, 11, ... with the given loss weights."""
    return Example(row, np.arange(10, 10 + len(weights)), np.array(weights, dtype=np.float32))


class Prediction(NamedTuple):
    """One trained token: which stream and position of which row predicts which position."""

    row: int
    stream: int
    source: int
    position: int
    target: int
    weight: float


def predictions(batch: dict, family: Family, kind: str = "noisy") -> list[Prediction]:
    streams = batch["streams"]
    made = []
    for flat, target, weight in zip(
        *(batch[f"{kind}_{part}"].tolist() for part in ("from", "target", "weight")), strict=True
    ):
        row, rest = divmod(flat, streams.total)
        stream, source = divmod(rest, streams.length)
        made.append(Prediction(row, stream, source, source + int(family.token_shift), target, weight))
    return made


def streams_of(batch: dict, row: int = 0) -> np.ndarray:
    """(streams, length) tokens of a row."""
    return batch["input_ids"][row].reshape(-1, batch["streams"].length).numpy()


def filled(family: Family, e: Example, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of the clean stream, written a second time."""
    fill, trained = {"fast_dllm_v2": (MASK, False), "sdar": (PAD, True), "converted": (STOP, True)}[family.name]
    tokens, weight = list(e.input_ids), list(e.loss_weight)
    while len(tokens) % SIZE:
        tokens.append(fill)
        weight.append(weight[len(e.input_ids) - 1] if trained else 0.0)
    missing = length - len(tokens)
    return np.array(tokens + [PAD] * missing), np.array(weight + [0.0] * missing)


weights = st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5]), min_size=1, max_size=23)
batches = st.lists(weights, min_size=1, max_size=3).map(lambda rows: [example(w, i) for i, w in enumerate(rows)])
stream_choices = st.fixed_dictionaries(
    {"exact_noisy": st.booleans(), "mask_stream": st.just(True), "sparse_stream": st.booleans()}
)
families = st.sampled_from(FAMILIES)


@given(families, batches, st.integers(0, 1000), stream_choices, st.sampled_from([1, 3, 16]))
def test_only_supervised_tokens_are_noised_or_trained_in_any_stream(family, examples, seed, choice, multiple):
    batch = Collator(family, seed, length_multiple=multiple, **choice)(examples)
    length = batch["streams"].length
    assert length % SIZE == length % multiple == 0
    for i, e in enumerate(examples):
        tokens, weight = filled(family, e, length)
        streams = streams_of(batch, i)
        assert streams[-1].tolist() == tokens.tolist()
        changed = streams[:-1] != tokens
        assert (streams[:-1][changed] == MASK).all()
        assert not changed[:, weight == 0].any()
    for kind in ("noisy", "sparse")[: 1 + choice["sparse_stream"]]:
        for p in predictions(batch, family, kind):
            tokens, weight = filled(family, examples[p.row], length)
            assert weight[p.position] > 0
            assert p.target == tokens[p.position]
            assert p.position > 0 or not family.token_shift


@given(families, batches, st.integers(0, 1000))
def test_every_hidden_token_is_predicted_from_its_own_stream(family, examples, seed):
    batch = Collator(family, seed, mask_stream=True, sparse_stream=True)(examples)
    found = {(p.row, p.stream, p.position) for kind in ("noisy", "sparse") for p in predictions(batch, family, kind)}
    num_streams = batch["streams"].total // batch["streams"].length
    for i in range(len(examples)):
        tokens, _ = filled(family, examples[i], batch["streams"].length)
        streams = streams_of(batch, i)
        assert streams[0].tolist() == streams[2].tolist(), "the sparse stream is the first noisy view"
        for s in range(num_streams - 1):
            if s == 1:  # the all-mask stream predicts nothing
                assert not any(f[:2] == (i, s) for f in found)
                continue
            hidden = np.flatnonzero(streams[s] != tokens)
            expected = {h for h in hidden.tolist() if h > 0 or not family.token_shift}
            assert {f[2] for f in found if f[:2] == (i, s)} == expected


@given(families, batches, st.integers(0, 1000))
def test_mask_stream_is_the_first_decoding_step_of_every_block(family, examples, seed):
    batch = Collator(family, seed, mask_stream=True)(examples)
    for i, e in enumerate(examples):
        tokens, weight = filled(family, e, batch["streams"].length)
        expected = np.where(all_mask_positions(weight, family), MASK, tokens)
        assert streams_of(batch, i)[0].tolist() == expected.tolist()


@given(batches, st.integers(0, 1000))
def test_complementary_views_hide_and_train_each_supervised_token_once(examples, seed):
    batch = Collator(FAST, seed)(examples)
    made = predictions(batch, FAST)
    for i, e in enumerate(examples):
        tokens, weight = filled(FAST, e, batch["streams"].length)
        first, second, _ = streams_of(batch, i)
        hidden = (first != tokens).astype(int) + (second != tokens)
        assert hidden.tolist() == (weight > 0).astype(int).tolist()
        trained = sorted(p.position for p in made if p.row == i)
        assert trained == [p for p in np.flatnonzero(weight > 0) if p > 0]


@given(batches, st.integers(0, 1000))
def test_seed_tokens_stay_and_are_predicted_from_the_clean_token_before(examples, seed):
    batch = Collator(CONVERTED_4, seed, mask_stream=True)(examples)
    clean = batch["streams"].offset("clean") // batch["streams"].length
    for i, e in enumerate(examples):
        tokens, weight = filled(CONVERTED_4, e, batch["streams"].length)
        assert (streams_of(batch, i)[:, ::SIZE] == tokens[::SIZE]).all()
        seeds = {p.position: p for p in predictions(batch, CONVERTED_4) if p.row == i and p.stream == clean}
        assert sorted(seeds) == [p for p in range(SIZE, len(tokens), SIZE) if weight[p] > 0]
        for position, p in seeds.items():
            assert (p.source, p.target) == (position - 1, tokens[position])
            assert p.weight == pytest.approx(0.1 * weight[position])


def test_shift_reads_the_position_before_and_no_shift_the_position_itself():
    e = example([0, 0, 1, 1, 1, 1, 1, 1])
    for family, shift in ((FAST, 1), (SDAR_4, 0)):
        batch = Collator(everything_masked(family), seed=0)([e])
        hidden = {p.source: p.target for p in predictions(batch, family) if p.stream == 0}
        assert hidden == {position - shift: 10 + position for position in range(2, 8)}


def test_the_first_token_of_a_row_is_never_predicted_with_shift():
    for family in (FAST, CONVERTED_4):
        batch = Collator(everything_masked(family), seed=0)([example([1] * 8)])
        assert min(p.position for p in predictions(batch, family)) == 1
    batch = Collator(everything_masked(SDAR_4), seed=0)([example([1] * 8)])
    assert min(p.position for p in predictions(batch, SDAR_4)) == 0


@pytest.mark.parametrize(
    ("family", "tail", "trained"),
    [(FAST, [MASK, MASK], []), (SDAR_4, [PAD, PAD], [6, 7]), (CONVERTED_4, [STOP, STOP], [6, 7])],
    ids=["fast_dllm_v2", "sdar", "converted"],
)
def test_stop_token_and_tail_of_the_last_block_follow_the_familys_rule(family, tail, trained):
    e = Example(0, np.array([10, 11, 12, 13, 14, STOP]), np.array([0, 0, 0, 1, 1, 2], dtype=np.float32))
    batch = Collator(everything_masked(family), seed=0, length_multiple=16)([e])
    assert streams_of(batch)[-1].tolist() == [10, 11, 12, 13, 14, STOP, *tail] + [PAD] * 8
    made = {p.position: p for p in predictions(batch, family)}
    assert (made[5].target, made[5].weight) == (STOP, 2.0)
    assert sorted(made) == [3, 4, 5, *trained]
    assert all((made[p].target, made[p].weight) == (tail[0], 2.0) for p in trained)


def test_a_tail_after_a_prompt_is_not_trained():
    for family in FAMILIES:
        batch = Collator(everything_masked(family), seed=0)([example([1, 1, 1, 0, 0, 0])])
        assert max(p.position for p in predictions(batch, family)) == 2


def test_loss_is_divided_by_what_the_family_counts():
    e = example([0, 0, 1, 1, 2, 1, 1, 1])
    fast = Collator(FAST, seed=0)([e])
    assert fast["loss_items"] == 7.0 == fast["noisy_weight"].sum()  # both views together: every supervised token
    sdar = Collator(SDAR_4, seed=0)([e])
    assert sdar["loss_items"] == 7.0  # supervised tokens, masked or not
    converted = Collator(everything_masked(CONVERTED_4), seed=0)([e])
    assert converted["loss_items"] == pytest.approx(5 + 0.1 * 2)  # weights of what is predicted, seed tokens too


def test_sdar_weights_are_one_over_the_masking_probability():
    batch = Collator(SDAR_4, seed=5)([example([2.0] * 32, row) for row in range(20)])
    for p in predictions(batch, SDAR_4):
        _, probability = draw_mask(np.ones(32, bool), SDAR_4.noise, SIZE, noise_generator(5, p.row, NOISE_DRAW))
        assert p.weight == pytest.approx(2.0 / probability[p.position])
    assert batch["noisy_weight"].sum() / batch["loss_items"] == pytest.approx(1.0, abs=0.2)  # its expectation is 1


def test_sparse_loss_has_its_own_divisor_whatever_other_streams_there_are():
    examples = [example([0.0] * 3 + [1.0] * 20)]
    for family in FAMILIES:
        alone = Collator(family, 0, exact_noisy=False, mask_stream=True, sparse_stream=True)(examples)
        beside = Collator(family, 0, mask_stream=True, sparse_stream=True)(examples)
        assert alone["sparse_items"] == beside["sparse_items"]
        assert alone["sparse_weight"].equal(beside["sparse_weight"])
        if family.loss_weight == "uniform":
            assert alone["sparse_items"] == alone["sparse_weight"].sum()


# --- blocks that alignment counts ------------------------------------------------------------------------------------


def test_counted_blocks_have_a_prefix_and_a_later_step_that_differs(monkeypatch):
    hidden = np.array([0, 1, 1, 1,  0, 0, 0, 0,  0, 1, 1, 1,  0, 1, 0, 0,  0, 0, 0, 0], dtype=bool)  # fmt: skip
    monkeypatch.setattr("mage_tune.data.collate.draw_mask", lambda maskable, *rest: (hidden & maskable, np.ones(20)))
    weight = [1] * 4 + [0] * 4 + [1] * 12  # no prefix | prompt | still all-mask | one left | finished
    batch = Collator(CONVERTED_4, seed=0, mask_stream=True, length_multiple=32)([example(weight)])
    assert batch["is_counted"].tolist() == [[[False, False, False, True, True, False, False, False]]]


def test_both_views_count_their_own_blocks():
    batch = Collator(FAST, seed=0, mask_stream=True)([example([0] * 8 + [1] * 24), example([1] * 32, row=1)])
    mask, first, second = (streams_of(batch)[s].reshape(-1, SIZE) for s in range(3))
    for view, tokens in enumerate((first, second)):
        expected = (tokens != mask).any(axis=1)
        expected[0] = False
        assert batch["is_counted"][view, 0].tolist() == expected.tolist()
    assert batch["is_counted"].shape == (2, 2, 8)


@given(families, batches, st.integers(0, 1000), st.integers(1, 8))
def test_sampled_blocks_are_distinct_counted_ones(family, examples, seed, wanted):
    batch = Collator(family, seed, mask_stream=True, sampled_blocks=wanted)(examples)
    for i in range(len(examples)):
        counted = np.flatnonzero(batch["is_counted"][:, i].any(dim=0).numpy())
        is_used = batch["is_sampled"][:, i].any(dim=0).numpy()
        used = batch["sampled_blocks"][i].numpy()[is_used]
        assert len(used) == len(set(used)) == min(wanted, len(counted))
        assert set(used) <= set(counted)
        blocks = batch["sampled_blocks"][i]
        assert batch["is_sampled"][:, i].equal(batch["is_counted"][:, i, blocks] & torch.from_numpy(is_used))


def test_sampling_takes_other_blocks_in_other_rows():
    batch = Collator(SDAR_4, 0, mask_stream=True, sampled_blocks=3)([example([1.0] * 128, i) for i in range(8)])
    assert len({tuple(blocks) for blocks in batch["sampled_blocks"].tolist()}) == 8


# --- noise belongs to the row, not to the batch ----------------------------------------------------------------------


def essence(batch: dict, family: Family, row: int, blocks: int) -> tuple:
    """What a row trains, free of where it stands in its batch."""
    streams = [s[: blocks * SIZE].tolist() for s in streams_of(batch, row)]
    made = [p[1:] for kind in ("noisy", "sparse") for p in predictions(batch, family, kind) if p.row == row]
    sampled = batch["sampled_blocks"][row][batch["is_sampled"][:, row].any(0)].tolist()
    return streams, made, batch["is_counted"][:, row, :blocks].tolist(), sampled


@given(families, batches, st.integers(0, 1000), st.sampled_from([1, 24, 128]))
def test_a_row_is_the_same_alone_in_a_batch_and_padded(family, examples, seed, multiple):
    options = {"mask_stream": True, "sparse_stream": True, "sampled_blocks": 2}
    together = Collator(family, seed, length_multiple=multiple, **options)(examples)
    alone = [Collator(family, seed, **options)([e]) for e in examples]
    for i, e in enumerate(examples):
        blocks = round_up(len(e.input_ids), SIZE) // SIZE
        assert essence(together, family, i, blocks) == essence(alone[i], family, 0, blocks)
        assert not together["is_counted"][:, i, blocks:].any()
    assert together["loss_items"].item() == pytest.approx(sum(b["loss_items"].item() for b in alone))
    assert together["sparse_items"].item() == pytest.approx(sum(b["sparse_items"].item() for b in alone))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_more_streams_leave_the_noise_as_it_was(family):
    examples = [example([0.0] * 5 + [1.0] * 18)]
    plain = Collator(family, 0)(examples)
    rich = Collator(family, 0, mask_stream=True, sparse_stream=True, sampled_blocks=2)(examples)
    assert streams_of(rich)[2:].tolist() == streams_of(plain).tolist()
    assert rich["noisy_target"].equal(plain["noisy_target"])


def test_seed_and_row_change_the_noise():
    def noise(seed: int, row: int) -> list:
        return Collator(SDAR_4, seed)([example([1.0] * 64, row)])["input_ids"].tolist()

    assert noise(0, 0) == noise(0, 0)
    assert noise(0, 0) != noise(1, 0)
    assert noise(0, 0) != noise(0, 1)


# --- the rest of the batch -------------------------------------------------------------------------------------------


def test_positions_restart_in_every_stream_and_tokens_are_counted_once():
    batch = Collator(FAST, 0, mask_stream=True, sparse_stream=True)([example([1] * 7), example([1] * 3, row=5)])
    assert batch["position_ids"].tolist() == [list(range(8)) * 5] * 2
    assert batch["num_tokens"] == 10
    assert batch["rows"] == [0, 5]
    streams = batch["streams"]
    assert (streams.sparse, streams.mask, streams.noisy, streams.total) == (True, True, 2, 40)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_teacher_predicts_the_same_tokens_in_a_noisy_and_clean_row(family):
    batch = Collator(family, 0, mask_stream=True, sparse_stream=True)([example([1] * 24), example([1] * 24, row=1)])
    for p, flat in zip(predictions(batch, family, "sparse"), batch["teacher_from"].tolist(), strict=True):
        assert flat == p.row * 2 * 24 + p.source


@pytest.mark.parametrize(("longest", "lengths"), [(2048, 8), (4096, 8), (200, 2), (1000, 8), (65536, 8)])
def test_rows_of_many_lengths_have_at_most_eight_on_a_gpu(longest, lengths):
    bucket = length_bucket(longest)
    assert bucket % TILE == 0
    found = {-(-length // bucket) * bucket for length in range(1, longest + 1)}
    assert len(found) <= lengths and longest <= max(found) < longest + bucket
