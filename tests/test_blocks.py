"""Who sees whom, and what noise hides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from mage_tune.blocks import (
    TILE,
    StreamLayout,
    all_mask_positions,
    draw_mask,
    maskable_positions,
    noise_generator,
    num_blocks,
    round_up,
)
from mage_tune.families import CONVERTED, FAST_DLLM_V2, SDAR, Noise


def matrix(rows: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in line.split()] for line in rows.strip().splitlines()]).bool()


# --- attention predicate ---------------------------------------------------------------------------------------------


def test_clean_stream_alone_is_block_causal():
    by_hand = matrix("""
        1 1 0 0 0 0
        1 1 0 0 0 0
        1 1 1 1 0 0
        1 1 1 1 0 0
        1 1 1 1 1 1
        1 1 1 1 1 1
    """)
    assert StreamLayout(0, 6, 2).dense_mask().equal(by_hand)


def test_one_noisy_stream_by_hand():
    by_hand = matrix("""
        1 1 0 0  0 0 0 0
        1 1 0 0  0 0 0 0
        0 0 1 1  1 1 0 0
        0 0 1 1  1 1 0 0
        0 0 0 0  1 1 0 0
        0 0 0 0  1 1 0 0
        0 0 0 0  1 1 1 1
        0 0 0 0  1 1 1 1
    """)
    assert StreamLayout(1, 4, 2).dense_mask().equal(by_hand)


def test_two_noisy_streams_by_hand_with_blocks_of_one():
    by_hand = matrix("""
        1 0 0  0 0 0  0 0 0
        0 1 0  0 0 0  1 0 0
        0 0 1  0 0 0  1 1 0
        0 0 0  1 0 0  0 0 0
        0 0 0  0 1 0  1 0 0
        0 0 0  0 0 1  1 1 0
        0 0 0  0 0 0  1 0 0
        0 0 0  0 0 0  1 1 0
        0 0 0  0 0 0  1 1 1
    """)
    assert StreamLayout(2, 3, 1).dense_mask().equal(by_hand)


def three_part_mask(num_noisy: int, blocks: int, block_size: int) -> np.ndarray:
    """BD3-LM's mask from its three parts: block diagonal, offset block-causal, block-causal."""
    ones = np.ones((block_size, block_size), dtype=bool)
    diagonal = np.kron(np.eye(blocks, dtype=bool), ones)
    before = np.kron(np.tri(blocks, k=-1, dtype=bool), ones)
    causal = np.kron(np.tri(blocks, dtype=bool), ones)
    nothing = np.zeros_like(diagonal)
    noisy = [[diagonal if i == j else nothing for j in range(num_noisy)] + [before] for i in range(num_noisy)]
    return np.block([*noisy, [nothing] * num_noisy + [causal]])


layouts = st.builds(
    lambda noisy, blocks, size: StreamLayout(noisy, blocks * size, size),
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(1, 5),
)


@given(layouts)
def test_every_layout_is_the_three_part_mask(layout):
    expected = three_part_mask(layout.num_noisy, layout.length // layout.block_size, layout.block_size)
    assert np.array_equal(layout.dense_mask().numpy(), expected)


@given(layouts)
def test_masks_of_single_streams_are_rows_of_the_whole(layout):
    whole, n = layout.dense_mask(), layout.length
    clean = layout.num_noisy * n
    assert layout.clean_mask().equal(whole[clean:, clean:])
    for stream in range(layout.num_noisy):
        own = whole[stream * n : (stream + 1) * n]
        assert layout.noisy_mask().equal(torch.cat([own[:, stream * n : (stream + 1) * n], own[:, clean:]], dim=1))


def test_a_length_that_is_not_whole_blocks_is_refused():
    with pytest.raises(ValueError, match="whole number of blocks"):
        StreamLayout(1, 10, 4)


# --- FlexAttention's mask --------------------------------------------------------------------------------------------


def elementwise(mask) -> torch.Tensor:
    """What a BlockMask lets through: full tiles whole, partial tiles through its predicate."""
    rows, columns = mask.seq_lengths
    allowed = torch.zeros(rows, columns, dtype=torch.bool)
    predicate = mask.mask_mod(0, 0, torch.arange(rows)[:, None], torch.arange(columns)[None, :])
    for counts, lists, is_full in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for i, count in enumerate(counts[0, 0].tolist()):
            for j in lists[0, 0, i, :count].tolist():
                tile = slice(i * TILE, (i + 1) * TILE), slice(j * TILE, (j + 1) * TILE)
                assert not allowed[tile].any(), "a tile is listed twice"
                allowed[tile] = True if is_full else predicate[tile]
    return allowed


tiled_layouts = st.builds(
    lambda noisy, tiles, size: StreamLayout(noisy, tiles * TILE, size),
    st.integers(0, 3),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]),
)


@given(tiled_layouts)
def test_closed_form_block_mask_lets_through_exactly_the_dense_mask(layout):
    assert elementwise(layout.block_mask("cpu")).equal(layout.dense_mask())


@given(tiled_layouts)
def test_closed_form_block_mask_equals_create_block_mask(layout):
    ours = layout.block_mask("cpu")
    theirs = create_block_mask(
        lambda b, h, q, k: layout.allowed(q, k), None, None, layout.total, layout.total, device="cpu", BLOCK_SIZE=TILE
    )
    assert ours.to_dense().equal(theirs.to_dense())
    # The backward pass walks the transposed lists.
    assert (ours.q_num_blocks + ours.full_q_num_blocks).equal(theirs.q_num_blocks + theirs.full_q_num_blocks)
    if layout.block_size < TILE:  # at the size of a tile ours leaves the diagonal partial, which is right too
        for counts in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert getattr(ours, counts).equal(getattr(theirs, counts))


def test_block_mask_is_made_once_per_layout():
    assert StreamLayout(1, TILE, 4).block_mask("cpu") is StreamLayout(1, TILE, 4).block_mask("cpu")


@pytest.mark.parametrize(("length", "block_size"), [(64, 4), (192, 4), (384, 96), (256, 256)])
def test_block_mask_refuses_what_does_not_tile(length, block_size):
    with pytest.raises(ValueError, match="FlexAttention"):
        StreamLayout(1, length, block_size).block_mask("cpu")


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_row_and_draw_alone():
    def numbers(*key: int) -> list[float]:
        return noise_generator(*key).random(4).tolist()

    first = numbers(3, 5, 1)
    noise_generator(3, 5, 1).random(100)  # what others draw does not matter
    assert numbers(3, 5, 1) == first
    assert len({tuple(numbers(*key)) for key in [(3, 5, 1), (4, 5, 1), (3, 6, 1), (3, 5, 0), (5, 3, 1)]}) == 5


@given(
    st.lists(st.booleans(), min_size=1, max_size=12),
    st.sampled_from(["block", "sample"]),
    st.integers(0, 1000),
)
def test_only_maskable_positions_are_masked_and_p_is_in_range(maskable, per, seed):
    maskable = np.repeat(maskable, 4)
    is_masked, p = draw_mask(maskable, Noise(per=per, low=0.2, high=0.8), 4, np.random.default_rng(seed))
    assert not (is_masked & ~maskable).any()
    assert p.min() > 0.2
    assert p.max() < 0.8 + 1e-3
    levels = p.reshape(-1, 4)
    assert (levels == levels[:, :1]).all()
    assert len(np.unique(p)) == (len(levels) if per == "block" else 1)


@pytest.mark.parametrize("per", ["block", "sample"])
def test_masked_share_follows_the_level(per):
    size = 4096
    is_masked, p = draw_mask(np.ones(8 * size, bool), Noise(per=per), size, np.random.default_rng(0))
    share = is_masked.reshape(8, size).mean(axis=1)
    expected = p.reshape(8, size)[:, 0]
    assert np.abs(share - expected).max() < 5 * 0.5 / np.sqrt(size)


def test_p_is_the_floored_level():
    draws = iter([np.array([0.0, 0.5, 1.0]), np.full(6, 0.0)])

    class Draws:  # a generator that hands out what the test chose
        def uniform(self, low, high, size):
            return low + (high - low) * next(draws)

        def random(self, size):
            return next(draws)

    _, p = draw_mask(np.ones(6, bool), Noise(per="block", low=0.1, high=0.5, floor=0.01), 2, Draws())
    assert p == pytest.approx(np.repeat([0.99 * t + 0.01 for t in (0.1, 0.3, 0.5)], 2))


def test_at_least_one_redraws_until_something_is_masked():
    rarely = Noise(per="sample", low=0.0, high=1e-3, at_least_one=True)
    maskable = np.zeros(16, bool)
    maskable[5] = True
    assert draw_mask(maskable, rarely, 4, np.random.default_rng(0))[0].tolist() == maskable.tolist()
    assert not draw_mask(np.zeros(16, bool), rarely, 4, np.random.default_rng(0))[0].any()  # and does not hang
    without = Noise(per="sample", low=0.0, high=1e-3)
    assert not draw_mask(maskable, without, 4, np.random.default_rng(0))[0].any()


def test_all_mask_share_sets_whole_blocks():
    noise = Noise(per="block", high=0.5, all_mask_share=0.15)
    is_masked, p = draw_mask(np.ones(4 * 5000, bool), noise, 4, np.random.default_rng(0))
    whole = (p.reshape(-1, 4) == 1.0).all(axis=1)
    assert is_masked.reshape(-1, 4)[whole].all()
    assert abs(whole.mean() - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 5000)
    assert draw_mask(np.ones(40, bool), Noise(per="block", all_mask_share=1.0), 4, np.random.default_rng(0))[0].all()


@pytest.mark.parametrize(
    ("family", "maskable", "at_start"),
    [
        (SDAR, "0 1 1 1  1 1 1 1", "0 1 1 1  1 1 1 1"),
        (FAST_DLLM_V2, "0 1 1 1  1 1 1 1", "0 1 1 1  0 1 1 1"),  # noise hides the seed token, decoding starts with it
        (CONVERTED, "0 1 1 1  0 1 1 1", "0 1 1 1  0 1 1 1"),
    ],
)
def test_which_positions_noise_may_hide_and_decoding_starts_without(family, maskable, at_start):
    weight = np.array([0, 1, 0.5, 1, 1, 1, 1, 2], dtype=np.float32)
    family = family.with_overrides(block_size=4)
    assert maskable_positions(weight, family).tolist() == matrix(maskable)[0].tolist()
    assert all_mask_positions(weight, family).tolist() == matrix(at_start)[0].tolist()


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_block_counts_and_rounding(length, size):
    blocks = num_blocks(length, size)
    assert (blocks - 1) * size < length <= blocks * size or length == blocks == 0
    assert round_up(length, size) == blocks * size
