"""What is drawn and what is accepted."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mage_tune.decode.sampler import (
    Acceptance,
    Sampling,
    cut_at_string,
    entropy_of,
    filter_logits,
    first_stop,
    schedule,
)

BANNED = 9


def logits_of(seed: int, rows: int = 4, vocab: int = 10) -> torch.Tensor:
    return 2.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 99), top_k=st.integers(0, 12), top_p=st.floats(0.05, 1.0))
def test_filters_against_a_loop(seed, top_k, top_p):
    logits = logits_of(seed)
    filtered = filter_logits(logits, top_k, top_p)
    for row, out in zip(logits.tolist(), filtered.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: -row[i])
        kept = order[: top_k or None]
        total, before, nucleus = sum(math.exp(row[i]) for i in kept), 0.0, []
        for i in kept:
            if nucleus and before > top_p + 1e-6:
                break
            nucleus.append(i)
            before += math.exp(row[i]) / total
        assert {i for i, x in enumerate(out) if x > -math.inf} == set(nucleus)
        assert all(out[i] == row[i] for i in nucleus)


@given(seed=st.integers(0, 99))
def test_greedy_takes_the_best_token_that_is_allowed(seed):
    logits = logits_of(seed)
    tokens, confidence = Sampling(top_k=1, top_p=0.1).draw(logits, None, BANNED)  # neither applies at temperature 0
    assert tokens.tolist() == logits[:, :BANNED].argmax(-1).tolist()
    assert torch.allclose(confidence, logits.softmax(-1)[range(4), tokens])


def test_draws_follow_the_distribution():
    logits, count = logits_of(1, rows=1), 40000
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(count, generator=generator).double()
    tokens, confidence = Sampling(temperature=1.5, top_p=0.9).draw(logits.expand(count, -1), uniform, BANNED)
    expected = filter_logits(logits / 1.5, 0, 0.9).softmax(-1)[0]
    assert torch.allclose(confidence, expected[tokens])
    expected[BANNED] = 0.0
    share = torch.bincount(tokens, minlength=10) / count
    assert (share - expected / expected.sum()).abs().max() < 0.01


def test_never_draws_the_banned_token_even_when_nothing_else_is_left():
    logits = torch.full((1, 10), -20.0)
    logits[0, BANNED] = 10.0
    logits[0, 4] = 1.0
    assert Sampling(temperature=1.0, top_k=1).draw(logits, torch.tensor([0.5]).double(), BANNED)[0].item() == 4
    assert Sampling().draw(logits, None, BANNED)[0].item() == 4


def test_extreme_uniforms_stay_inside_the_support():
    logits = torch.full((2, 10), -math.inf)
    logits[:, 3:6] = 0.0
    uniform = torch.tensor([0.0, 1.0 - 2.0**-24]).double()
    assert Sampling(temperature=1.0).draw(logits, uniform, BANNED)[0].tolist() == [3, 5]


def accepted(confidence, quota=1, entropy=None, **options):
    unsure = None if entropy is None else torch.tensor(entropy)
    keep = Acceptance(**options).accept(torch.tensor(confidence), unsure, quota)
    return keep.nonzero().flatten().tolist()


def test_threshold():
    confidence = [0.95, -math.inf, 0.2, 0.91, 0.9]
    assert accepted(confidence) == [0, 3]  # above, not at
    assert accepted(confidence, quota=3) == [0, 3, 4]
    assert accepted(confidence, quota=9) == [0, 2, 3, 4]
    assert accepted(confidence, threshold=1.0) == [0]
    assert accepted([-math.inf, 0.1, 0.3]) == [2]
    assert accepted(confidence, threshold=0.0) == [0, 2, 3, 4]


def test_static():
    confidence = [0.95, -math.inf, 0.2, 0.91, 0.9]
    assert accepted(confidence, name="static") == [0]
    assert accepted(confidence, quota=2, name="static") == [0, 3]


@given(
    entropy=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=8),
    bound=st.floats(0.0, 3.0),
    quota=st.integers(1, 4),
)
def test_entropy_bound_against_a_loop(entropy, bound, quota):
    entropy = torch.tensor(entropy).tolist()
    is_masked = [i % 3 != 1 for i in range(len(entropy))]
    confidence = [0.5 if masked else -math.inf for masked in is_masked]
    given_entropy = [h if masked else math.inf for h, masked in zip(entropy, is_masked, strict=True)]
    keep = accepted(confidence, quota, given_entropy, name="entropy", entropy_bound=bound)
    order = sorted((i for i, masked in enumerate(is_masked) if masked), key=lambda i: entropy[i])
    expected, sizes = set(order[:quota]), []
    for count in range(1, len(order) + 1):
        chosen = order[:count]
        spare = sum(entropy[i] for i in chosen) - max(entropy[i] for i in chosen)
        sizes.append(spare)
        if spare <= bound - 1e-5:
            expected |= set(chosen)
    if all(abs(spare - bound) > 1e-5 for spare in sizes):  # rounding decides at the bound itself
        assert set(keep) == expected


def test_entropy_of():
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf], [5.0, -math.inf, -math.inf, -math.inf]])
    assert torch.allclose(entropy_of(logits), torch.tensor([math.log(2.0), 0.0]))


@given(window=st.integers(1, 64), steps=st.integers(1, 64))
def test_schedule_spreads_the_window(window, steps):
    quotas = schedule(window, steps)
    assert len(quotas) == steps
    assert sum(quotas) == window
    assert quotas == sorted(quotas, reverse=True)
    assert max(quotas) - min(quotas) <= 1


def test_stops():
    assert first_stop([4, 5, 6, 5], frozenset({5, 6})) == 1
    assert first_stop([4], frozenset()) is None

    def decode(tokens):
        return "".join(chr(t) for t in tokens)

    tokens = [ord(c) for c in "one two three"]
    assert cut_at_string(tokens, ["two", "e t"], decode) == len("one t")
    assert cut_at_string(tokens, ["o"], decode) == 1
    assert cut_at_string(tokens, ["ee"], decode) == len(tokens)
    assert cut_at_string(tokens, ["x"], decode) is None


@pytest.mark.parametrize("options", [{"name": "best"}, {"threshold": -0.1}, {"entropy_bound": -1.0}])
def test_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options)) if "name" not in options else "unknown acceptance"):
        Acceptance(**options)
