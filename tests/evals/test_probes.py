"""Text probes against a slow transcription: every variant as a whole sequence, dense masks, float64, no cache."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mage_tune.backbone import hidden_states, output_head
from mage_tune.blocks import noise_generator
from mage_tune.evals.probes import REVEALS, block_variants, probe_text, probe_window
from mage_tune.families import get_family
from mage_tune.lm import from_backbone

SEED, DENSE, BLOCKS = 5, 1, 12
SEEDLESS = get_family("converted").with_overrides(name="seedless", seed_token=False)
"""Token shift where the first token of a block is masked too, so the clean token before it has to predict."""
FAMILIES = [
    pytest.param("converted", "llama", 8, id="converted"),
    pytest.param("fast_dllm_v2", "qwen2", 8, id="fast_dllm_v2"),
    pytest.param("sdar", "qwen3", 4, id="sdar"),
    pytest.param(SEEDLESS, "llama", 8, id="seedless"),
]


def sequence_pass(lm, tokens, chosen):
    """One clean sequence whose last block is a variant; `chosen[layer][head]`: prefix keys it may see, None for all.

    Returns:
        hidden: (n, hidden).
        scores: per layer (KV heads, prefix) attention over the prefix, mean over block and group.
        queries: per layer (KV heads, D) mean query of the block and the group.
    """
    size, n = lm.family.block_size, len(tokens)
    prefix = n - size
    block_of = torch.arange(n) // size
    scores, queries = [], []

    def attend(layer, query, key, value, scaling):
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        out = torch.empty_like(query)
        scores.append(torch.zeros(heads, prefix, dtype=query.dtype))
        queries.append(torch.zeros(heads, query.shape[-1], dtype=query.dtype))
        for head in range(query.shape[1]):
            shared = head // group
            logits = query[0, head] @ key[0, shared].T * scaling  # (n, n)
            over_prefix = logits[prefix:, :prefix].softmax(-1).mean(0)
            scores[layer][shared] += over_prefix / group
            queries[layer][shared] += query[0, head, prefix:].mean(0) / group
            visible = block_of[:, None] >= block_of[None]
            if chosen is not None and layer >= DENSE:
                hidden_keys = [i for i in range(prefix) if i not in chosen[layer][shared]]
                visible[prefix:, hidden_keys] = False
            out[0, head] = logits.masked_fill(~visible, float("-inf")).softmax(-1) @ value[0, shared]
        return out

    ids = torch.tensor(tokens)[None]
    hidden = hidden_states(lm.model, ids, torch.arange(n)[None], attend)[0]
    return hidden, scores, queries


def top(scores, budget):
    """chosen[layer][head] -> set of key positions."""
    return [[set(head.topk(min(budget, len(head))).indices.tolist()) for head in layer] for layer in scores]


def still_masked_loss(lm, hidden, tokens, truth):
    """Mean cross-entropy of the masked tokens of the last block."""
    size = lm.family.block_size
    start = len(tokens) - size
    losses = []
    for i in range(start, len(tokens)):
        if tokens[i] == lm.family.mask_id:
            logits = output_head(lm.model)(hidden[i - 1 if lm.family.token_shift else i])
            logits[lm.family.mask_id] = float("-inf")
            losses.append(F.cross_entropy(logits, torch.tensor(truth[i - start])))
    return torch.stack(losses).mean().item()


@torch.no_grad()
def slow_probe(lm, tokens, block, budgets):
    """What `probe_window` measures in one block, one whole sequence after another."""
    size = lm.family.block_size
    prefix, truth = tokens[: block * size], tokens[block * size : (block + 1) * size]
    rows, _ = block_variants(lm.family, tokens, block, budgets, noise_generator(SEED, 0, block))
    _, at_mask, mask_query = sequence_pass(lm, np.concatenate([prefix, rows[0]]), None)
    found = {name: [] for name in ("ce_exact", "ce_mask", "ce_oracle", "recall", "mass", "query_cosine")}
    per_reveal = 1 + 2 * len(budgets)
    for reveal in range(len(REVEALS)):
        sequence = np.concatenate([prefix, rows[1 + reveal * per_reveal]])
        hidden, later, later_query = sequence_pass(lm, sequence, None)
        found["ce_exact"].append(still_masked_loss(lm, hidden, sequence, truth))
        cosine = [F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(mask_query, later_query, strict=True)]
        found["query_cosine"].append(torch.stack(cosine[DENSE:]).mean().item())
        for name in ("ce_mask", "ce_oracle", "recall", "mass"):
            found[name].append([])
        for budget in budgets:
            chosen, own = top(at_mask, budget), top(later, budget)
            for name, keys in (("ce_mask", chosen), ("ce_oracle", own)):
                hidden, _, _ = sequence_pass(lm, sequence, keys)
                found[name][-1].append(still_masked_loss(lm, hidden, sequence, truth))
            pairs = [(layer, head) for layer in range(DENSE, len(later)) for head in range(len(later[0]))]
            found["recall"][-1].append(np.mean([len(chosen[i][h] & own[i][h]) / len(own[i][h]) for i, h in pairs]))
            found["mass"][-1].append(np.mean([later[i][h][list(chosen[i][h])].sum().item() for i, h in pairs]))
    return {name: np.mean(values, axis=0) for name, values in found.items()}


def window_of(blocks, size, vocab=60, seed=0):
    return np.random.default_rng(seed).integers(4, vocab, blocks * size)


@pytest.mark.parametrize(("family", "architecture", "size"), FAMILIES)
def test_probes_equal_whole_sequences_without_a_cache(tiny_backbone, family, architecture, size):
    lm = from_backbone(tiny_backbone(family, block_size=size, architecture=architecture))
    exact = from_backbone(tiny_backbone(family, block_size=size, architecture=architecture))
    exact.model.double()
    tokens, budgets = window_of(BLOCKS, size), [3, 10]
    records = probe_window(lm, tokens, 0, blocks=3, budgets=budgets, dense_layers=DENSE, seed=SEED)
    assert [r.block for r in records] == [6, 8, 11]
    for record in records:
        slow = slow_probe(exact, tokens, record.block, budgets)
        for name in ("ce_exact", "ce_mask", "ce_oracle", "mass", "query_cosine"):
            np.testing.assert_allclose(getattr(record, name), slow[name], rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(record.recall, slow["recall"], rtol=1e-6)
        assert 0 < min(record.recall) < 1  # the comparison is not of trivial numbers
        assert abs(record.ce_mask[0] - record.ce_exact) > 1e-3
        assert np.mean(record.recall_by_layer, axis=1) == pytest.approx(record.recall)
        assert np.shape(record.recall_by_layer) == (len(budgets), lm.model.config.num_hidden_layers - DENSE)


@pytest.mark.parametrize(("family", "architecture", "size"), FAMILIES)
def test_a_budget_as_long_as_the_prefix_changes_nothing(tiny_backbone, family, architecture, size):
    lm = from_backbone(tiny_backbone(family, block_size=size, architecture=architecture))
    tokens = window_of(6, size)
    for record in probe_window(lm, tokens, 0, blocks=2, budgets=[len(tokens)], dense_layers=0, seed=0):
        assert record.ce_mask[0] == pytest.approx(record.ce_exact, abs=1e-5)
        assert record.ce_oracle[0] == pytest.approx(record.ce_exact, abs=1e-5)
        assert record.recall == [1.0]
        assert record.mass[0] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("family", "size"), [("converted", 8), ("sdar", 4), ("converted", 2)])
def test_reveals_are_nested_and_always_leave_something_masked(tiny_backbone, family, size):
    lm = from_backbone(tiny_backbone(family, block_size=size))
    tokens = window_of(4, size)
    rows, is_masked = block_variants(lm.family, tokens, 3, [1, 2], noise_generator(0, 0, 3))
    truth = tokens[3 * size :]
    assert rows.shape == (1 + len(REVEALS) * 5, size)
    assert np.array_equal(rows == lm.family.mask_id, is_masked)
    assert np.array_equal(rows[~is_masked], np.broadcast_to(truth, rows.shape)[~is_masked])
    assert is_masked[0].sum() == size - lm.family.seed_token  # a seeded block starts with one real token
    steps = is_masked[1::5]
    assert all(np.array_equal(is_masked[1 + 5 * i + j], steps[i]) for i in range(len(steps)) for j in range(5))
    assert all((later <= earlier).all() for earlier, later in zip([is_masked[0], *steps[:-1]], steps, strict=True))
    assert is_masked.sum(1).min() >= 1


def test_windows_are_numbered_and_repeatable(tiny_backbone):
    lm = from_backbone(tiny_backbone(block_size=4))
    windows = [window_of(8, 4, seed=i) for i in range(2)]
    seen = []
    options = {"blocks": 2, "budgets": [2, 4], "dense_layers": 1, "seed": 3}
    first = probe_text(lm, windows, on_window=lambda: seen.append(1), **options)
    assert [(r.window, r.block) for r in first] == [(0, 4), (0, 7), (1, 4), (1, 7)]
    assert len(seen) == 2
    assert first == probe_text(lm, windows, **options)
    assert first != probe_text(lm, windows, **options | {"seed": 4})
