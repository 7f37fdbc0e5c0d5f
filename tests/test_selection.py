"""Scores of keys and the choice of the best, against loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mage_tune.selection import (
    choose_keys,
    gather_keys,
    mean_probability,
    packed_rows,
    prefix_visible,
    top_keys,
    unpacked_rows,
)

BATCH, HEADS, KV_HEADS, BLOCKS, SIZE, DIM = 2, 6, 2, 4, 3, 8
GROUP, LENGTH = HEADS // KV_HEADS, BLOCKS * SIZE


@pytest.fixture
def query_and_key():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, HEADS, LENGTH, DIM, generator=generator)
    return query, torch.randn(BATCH, KV_HEADS, LENGTH, DIM, generator=generator)


def slow_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> np.ndarray:
    """Mean prefix attention of every block per KV head: (batch, KV heads, blocks, N) in float64."""
    q, k = query.double().numpy(), key.double().numpy()
    out = np.zeros((BATCH, KV_HEADS, BLOCKS, LENGTH))
    for b in range(BATCH):
        for head in range(HEADS):
            for i in range(SIZE, LENGTH):
                prefix = i // SIZE * SIZE
                kv_head = head // GROUP
                logits = scaling * (k[b, kv_head, :prefix] @ q[b, head, i])
                p = np.exp(logits - logits.max())
                out[b, kv_head, i // SIZE, :prefix] += p / p.sum() / (GROUP * SIZE)
    return out


def test_packed_rows_are_the_queries_of_a_block_and_group(query_and_key):
    query, _ = query_and_key
    rows = packed_rows(query, KV_HEADS, SIZE)
    assert rows.shape == (BATCH, KV_HEADS, BLOCKS, GROUP * SIZE, DIM)
    for h in range(KV_HEADS):
        for j in range(BLOCKS):
            own = query[:, h * GROUP : (h + 1) * GROUP, j * SIZE : (j + 1) * SIZE]
            assert rows[:, h, j].equal(own.reshape(BATCH, GROUP * SIZE, DIM))
    assert unpacked_rows(rows, HEADS, SIZE).equal(query)


def test_mean_probability_equals_loops(query_and_key):
    query, key = query_and_key
    visible = prefix_visible(torch.arange(BLOCKS), LENGTH, SIZE)
    score = mean_probability(packed_rows(query, KV_HEADS, SIZE), key, visible, 0.35)
    np.testing.assert_allclose(score.numpy(), slow_scores(query, key, 0.35), atol=1e-6)
    assert score.sum(-1)[:, :, 1:].allclose(torch.tensor(1.0))


def test_a_block_without_prefix_scores_nothing_and_gives_no_nan_gradient(query_and_key):
    query, key = query_and_key
    rows = packed_rows(query, KV_HEADS, SIZE).requires_grad_()
    score = mean_probability(rows, key, prefix_visible(torch.arange(BLOCKS), LENGTH, SIZE), 0.35)
    assert not score[:, :, 0].any()
    score.square().sum().backward()
    assert rows.grad.isfinite().all()
    assert not rows.grad[:, :, 0].any()
    assert rows.grad[:, :, 1:].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_compiled_probabilities_and_their_gradients_are_those_of_a_cpu():
    generator = torch.Generator().manual_seed(0)
    for length in (LENGTH, 2 * LENGTH):
        rows = torch.randn(2, KV_HEADS, BLOCKS, 6, 8, generator=generator)
        key = torch.randn(2, KV_HEADS, length, 8, generator=generator)
        found = []
        for device in ("cpu", "cuda"):
            inputs = [x.detach().to(device).requires_grad_() for x in (rows, key)]
            visible = prefix_visible(torch.arange(BLOCKS, device=device), length, SIZE)
            score = mean_probability(*inputs, visible, 0.35, compiled=True)
            score.square().sum().backward()
            found.append([score.detach().cpu(), *(x.grad.cpu() for x in inputs)])
        for ours, expected in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_prefix_ends_before_the_block():
    visible = prefix_visible(torch.tensor([[0, 2], [1, 3]]), 8, 2)
    assert visible.sum(-1).tolist() == [[0, 4], [2, 6]]
    assert visible[0, 1].tolist() == [True] * 4 + [False] * 4


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 10_000))
def test_top_keys_are_the_best_visible_ones_in_order(budget, num_visible, seed):
    rng = np.random.default_rng(seed)
    score = rng.permutation(12).astype(np.float32)
    visible = np.isin(np.arange(12), rng.permutation(12)[:num_visible])
    index, kept = top_keys(torch.from_numpy(score), budget, torch.from_numpy(visible))
    best = sorted(np.flatnonzero(visible), key=lambda i: -score[i])[:budget]
    assert index[kept].tolist() == sorted(best)
    assert len(index) == budget
    assert index.tolist() == sorted(index.tolist())


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("budget", [1, 4, 100])
def test_choose_keys_takes_the_most_attended_prefix(query_and_key, budget, chunk):
    query, key = query_and_key
    rows = packed_rows(query, KV_HEADS, SIZE)
    index, kept = choose_keys(rows, key, torch.arange(BLOCKS), SIZE, budget, 0.35, chunk=chunk)
    scores = slow_scores(query, key, 0.35)
    for b, h, j in np.ndindex(BATCH, KV_HEADS, BLOCKS):
        best = np.argsort(-scores[b, h, j, : j * SIZE])[:budget]
        assert index[b, h, j][kept[b, h, j]].tolist() == sorted(best.tolist())


def test_choose_keys_serves_blocks_in_any_order(query_and_key):
    query, key = query_and_key
    rows = packed_rows(query, KV_HEADS, SIZE)
    blocks = torch.tensor([3, 1])
    index, kept = choose_keys(rows[:, :, blocks], key, blocks, SIZE, 4, 0.35)
    whole_index, whole_kept = choose_keys(rows, key, torch.arange(BLOCKS), SIZE, 4, 0.35)
    assert kept.equal(whole_kept[:, :, blocks])
    assert index[kept].equal(whole_index[:, :, blocks][kept])


def test_gather_keys_takes_each_heads_own_rows(query_and_key):
    _, key = query_and_key
    index = torch.randint(LENGTH, (BATCH, KV_HEADS, BLOCKS, 5), generator=torch.Generator().manual_seed(0))
    chosen = gather_keys(key, index)
    for b, h, j, i in np.ndindex(*index.shape):
        assert chosen[b, h, j, i].equal(key[b, h, index[b, h, j, i]])
