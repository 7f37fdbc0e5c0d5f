"""The likelihood of a continuation: against a transcription from whole forwards, and against what decoding writes."""

import math

import pytest
import torch

from mage_tune.decode.rules import make_rule
from mage_tune.evals.harness.likelihood import ContinuationScorer
from mage_tune.lm import from_backbone

CONTEXT = [5, 9, 17, 30, 8, 11, 4, 22, 40, 41, 13, 7, 50, 33]
FAMILIES = ["converted", "fast_dllm_v2", "sdar"]


def scorer_of(lm, rule="exact", **options) -> ContinuationScorer:
    return ContinuationScorer(lm, make_rule(rule, **options), 128)


def by_whole_forwards(lm, context, continuation) -> float:
    """The formula, word for word: one forward of everything for every token, no cache."""
    size, mask, total = lm.family.block_size, lm.family.mask_id, 0.0
    shift = int(lm.family.token_shift)
    tokens = [*context, *continuation]
    for i in range(len(context), len(tokens)):
        known = tokens[:i]
        if not (lm.family.seed_token and i % size == 0):  # a seed is predicted by the clean blocks before it
            known = known + [mask] * (-i % size or size)
        logits = lm.logits(torch.tensor([known]))[0, i - shift].float()
        if lm.family.name == "converted":
            logits[mask] = -math.inf
        total += logits.log_softmax(-1)[tokens[i]].item()
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [1, 4, 7])
def test_equals_the_formula(tiny_backbone, family, start):
    lm = from_backbone(tiny_backbone(family))
    for length in (1, 6):
        continuation = [20 + 3 * i for i in range(length)]
        found = scorer_of(lm).score(CONTEXT[:start], continuation)
        assert found.log_probability == pytest.approx(by_whole_forwards(lm, CONTEXT[:start], continuation), abs=2e-4)


def test_sums_to_one_over_continuations(tiny_backbone):
    lm = from_backbone(tiny_backbone())
    scorer, vocab, mask = scorer_of(lm), 64, lm.family.mask_id
    context = CONTEXT[:7]  # the second token opens another block
    first = {t: math.exp(scorer.score(context, [t]).log_probability) for t in range(vocab) if t != mask}
    assert sum(first.values()) == pytest.approx(1.0, abs=1e-4)
    of_nine = [math.exp(scorer.score(context, [9, t]).log_probability) for t in range(vocab) if t != mask]
    assert sum(of_nine) == pytest.approx(first[9], rel=1e-3)


@pytest.mark.parametrize(
    "rule", ["exact", "mage", "mage-v1", "mean-query", "sparsed", "sparse-dllm", "quest", "oracle"]
)
@pytest.mark.parametrize("family", ["converted", "fast_dllm_v2"])
def test_greedy_is_what_decoding_left_to_right_writes(tiny_backbone, family, rule):
    """Also under every rule: the same keys in the same states."""
    lm = from_backbone(tiny_backbone(family, block_size=8))
    options = {} if rule == "exact" else {"budget": 8, "dense_layers": 1}
    context = [(7 * i) % 60 + 2 for i in range(35)]
    written = lm.generate(
        context, max_new_tokens=18, attention=rule, sub_block=1, threshold=1.0, stop_ids=[], **options
    )
    scorer = scorer_of(lm, rule, **options)
    assert scorer.score(context, written.tokens).is_greedy
    other = [*written.tokens[:-1], (written.tokens[-1] + 1) % 60]
    assert not scorer.score(context, other).is_greedy


def test_a_sparse_rule_changes_the_likelihood_and_a_large_budget_does_not(tiny_backbone):
    lm = from_backbone(tiny_backbone(block_size=8))
    context, continuation = [(7 * i) % 60 + 2 for i in range(64)], [3, 4, 5, 6]
    exact = scorer_of(lm).score(context, continuation)
    assert scorer_of(lm, "mage", budget=64).score(context, continuation) == exact
    sparse = scorer_of(lm, "mage", budget=4, dense_layers=1).score(context, continuation)
    assert abs(sparse.log_probability - exact.log_probability) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_scored_before_does_not_matter(tiny_backbone, family):
    lm = from_backbone(tiny_backbone(family))
    asked = [
        (CONTEXT, [3, 4, 5, 6, 7, 8]),
        (CONTEXT, [9]),
        (CONTEXT[:5], [1, 2]),
        (CONTEXT[:8], [44]),
        (CONTEXT, [3, 4]),
    ]
    one = scorer_of(lm)
    for context, continuation in asked:
        fresh = scorer_of(lm).score(context, continuation)
        assert one.score(context, continuation).log_probability == pytest.approx(fresh.log_probability, abs=1e-4)


def test_refuses_what_has_no_likelihood(tiny_backbone):
    lm = from_backbone(tiny_backbone())
    with pytest.raises(ValueError, match="at least one token of context"):
        scorer_of(lm).score([], [3])
    with pytest.raises(ValueError, match="at least one token of context"):
        scorer_of(lm).score([3], [])
    with pytest.raises(ValueError, match="mask token"):
        scorer_of(lm).score([3], [lm.family.mask_id])
