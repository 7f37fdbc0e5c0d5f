"""Selection rules against slow float64 transcriptions, and what all of them have in common."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mage_tune.decode.attention import LayerView, block_forward, extend
from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.rules import RULES, Mage, MageV1, MeanQuery, Oracle, Quest, SparseD, SparseDLLM, Tidal, make_rule
from mage_tune.decode.steps import BlockSteps, Levers, choose_forward
from mage_tune.selection import choose_keys, top_keys, top_pages

LENGTHS = (37, 21)
ONCE = [name for name, rule in RULES.items() if rule.chooses == "once"]


@pytest.fixture
def view() -> LayerView:
    """Two rows, two KV heads, a group of 2 and a block of 3: R = 6 packed rows over up to 37 keys."""
    generator = torch.Generator().manual_seed(3)
    rows = 2.0 * torch.randn(2, 2, 6, 8, generator=generator)
    key = torch.randn(2, 2, 37, 8, generator=generator)
    visible = torch.arange(37) < torch.tensor(LENGTHS)[:, None]
    return LayerView(2, rows, key, visible, LENGTHS, 8**-0.5)


def heads_of(view):
    """(row, head, (R, n) float64 logits, (R, n) float64 probabilities, n visible keys, queries, keys)."""
    for b, n in enumerate(LENGTHS):
        for h in range(2):
            queries = view.rows[b, h].double().numpy()
            keys = view.key[b, h, :n].double().numpy()
            logits = np.array([[float(np.dot(q, k)) * view.scaling for k in keys] for q in queries])
            exponentials = np.exp(logits - logits.max(1, keepdims=True))
            yield b, h, logits, exponentials / exponentials.sum(1, keepdims=True), n, queries, keys


def best(scores, count):
    """The `count` best of a list, ties by position, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def chosen(rule, view, row, head, layer=0, observed=None):
    selection = rule.choose(observed or [rule.observe(view)], LENGTHS)
    return selection.index[layer, row, head][selection.is_kept[layer, row, head]].tolist()


def test_mage(view):
    for b, h, _, probability, _, _, _ in heads_of(view):
        for rule in (Mage(budget=9), Oracle(budget=9)):
            assert chosen(rule, view, b, h) == best(probability.mean(0), 9)


@pytest.mark.parametrize("follow", [1, 3, 50])
def test_keys_behind_a_good_one_are_as_good(view, follow):
    for b, h, _, probability, n, _, _ in heads_of(view):
        score = probability.mean(0)
        spread = [max(score[max(0, i - follow) : i + 1]) for i in range(n)]
        assert chosen(Mage(budget=9, follow=follow), view, b, h) == best(spread, 9)


@pytest.mark.parametrize("given", [{"3": 4, "2": 30}, ((2, 30), (3, 4))], ids=["mapping", "pairs"])
def test_layers_keep_budgets_of_their_own(view, given):
    rule = Mage(budget=9, layer_budgets=given)
    layers = [rule.observe(view)] * 3  # layers 2, 3 and 4
    for b, h, _, probability, n, _, _ in heads_of(view):
        for at, budget in enumerate((30, 4, 9)):
            kept = best(probability.mean(0), min(budget, n) if rule.is_sparse(n) else n)
            assert chosen(rule, view, b, h, at, layers) == kept
    assert rule.settings()["layer_budgets"] == ((2, 30), (3, 4))
    with pytest.raises(ValueError, match="the model has no layer 3"):
        rule.choose(layers[:1], view.lengths)


def test_mage_chooses_what_training_chooses(view):
    # One clean stream of 36 keys; the block numbered 12 on a grid of 3 sees all of them.
    rows, key = view.rows[:1].unsqueeze(2), view.key[:1, :, :36]
    index, is_kept = choose_keys(rows, key, torch.tensor([12]), 3, 9, view.scaling)
    here = LayerView(2, view.rows[:1], key, torch.ones(1, 36, dtype=torch.bool), (36,), view.scaling)
    selection = Mage(budget=9).choose([Mage(budget=9).observe(here)], (36,))
    assert is_kept.all()
    assert torch.equal(selection.index[0], index[:, :, 0])


def test_mean_query(view):
    for b, h, logits, _, _, _, _ in heads_of(view):
        assert chosen(MeanQuery(budget=9), view, b, h) == best(logits.mean(0), 9)


def test_mage_v1(view):
    rule = MageV1(budget=4, min_budget=2)
    sharper = LayerView(3, 3.0 * view.rows, view.key, view.is_visible, LENGTHS, view.scaling)
    observed = [rule.observe(view), rule.observe(sharper)]
    scores, unions, strengths = {}, {}, np.zeros((2, 2))
    for layer, one in enumerate((view, sharper)):
        for b, h, _, probability, n, _, _ in heads_of(one):
            lists = [set(best(row, 4)) for row in probability]
            union = sorted(set().union(*lists))
            covered = sum(probability[q, i] for q in range(6) for i in union) / 6
            strengths[layer, b] = max(strengths[layer, b], len(union) * (1.0 - math.log(covered)))
            votes = {i: sum(i in one_list for one_list in lists) for i in union}
            order = sorted(union, key=lambda i: (-votes[i], -probability[:, i].mean()))
            scores[layer, b, h] = order + [i for i in reversed(range(n)) if i not in union]  # then the most recent
            unions[layer, b, h] = union
    for layer in range(2):
        for b in range(2):
            budget = max(2, math.floor(strengths[layer, b] / strengths[:, b].sum() * 4 * 2))
            for h in range(2):
                assert chosen(rule, view, b, h, layer, observed) == sorted(scores[layer, b, h][:budget])
    assert strengths[0, 0] != strengths[1, 0]


def test_mage_v1_fills_up_with_recent_keys(view):
    rule = MageV1(budget=4, min_budget=30)
    for b, h, _, probability, n, _, _ in heads_of(view):
        union = set().union(*(best(row, 4) for row in probability))
        expected = sorted([*union, *[i for i in reversed(range(n)) if i not in union]][: min(30, n)])
        assert chosen(rule, view, b, h) == expected


def test_quest(view):
    rule = Quest(budget=8, page_size=4)
    for b, h, _, _, n, queries, keys in heads_of(view):
        scores = []
        for first in range(0, n, 4):
            low, high = keys[first : first + 4].min(0), keys[first : first + 4].max(0)
            scores.append(np.mean([sum(max(q[d] * high[d], q[d] * low[d]) for d in range(8)) for q in queries]))
        expected = [i for page in best(scores, 2) for i in range(page * 4, min(n, page * 4 + 4))]
        assert chosen(rule, view, b, h) == expected


@pytest.mark.parametrize(("ratio", "tiles"), [(None, 2), (0.3, None)])
def test_sparsed(view, ratio, tiles):
    rule = SparseD(budget=10, tile=5, ratio=ratio)
    for b, h, _, probability, n, _, _ in heads_of(view):
        scores = [probability[:, first : first + 5].sum() for first in range(0, n, 5)]
        count = tiles or int(len(scores) * 0.3) + 1
        expected = [i for tile in best(scores, count) for i in range(tile * 5, min(n, tile * 5 + 5))]
        assert chosen(rule, view, b, h) == expected


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_sparse_dllm(view, ratio):
    rule = SparseDLLM(budget=9, ratio=ratio)
    per_row = {}
    for b, _, logits, _, _, _, _ in heads_of(view):
        per_row.setdefault(b, []).append(logits.mean(0))
    for b, heads in per_row.items():
        mean = np.mean(heads, axis=0)
        pooled = [max(mean[max(0, i - 1) : i + 2]) for i in range(len(mean))]
        expected = best(pooled, 9 if ratio is None else int(len(mean) * ratio))
        for h in range(2):
            assert chosen(rule, view, b, h) == expected


def test_tidal_shares_keys_between_layers():
    rule = Tidal(budget=9, dense_layers=2, correction_layer=5)
    assert [rule.source_layer(layer) for layer in range(2, 8)] == [2, 2, 2, 5, 5, 5]
    assert Tidal(dense_layers=2, correction_layer=1).source_layer(4) == 2
    assert rule.sources_are_exact


@pytest.mark.parametrize("name", [n for n in RULES if n != "exact"])
def test_sinks_and_recent_keys_are_always_kept(view, name):
    rule = make_rule(name, budget=12, sinks=2, recent=3)
    if name == "sparsed":
        rule = make_rule(name, budget=12, sinks=2, recent=3, tile=3)
    if name == "quest":
        rule = make_rule(name, budget=12, sinks=2, recent=3, page_size=3)
    for b, n in enumerate(LENGTHS):
        for h in range(2):
            keys = chosen(rule, view, b, h)
            assert {0, 1, n - 3, n - 2, n - 1} <= set(keys)
            assert len(keys) <= 12


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    page=st.integers(1, 6),
    budget=st.integers(1, 25),
    seed=st.integers(0, 99),
)
def test_top_pages(lengths, page, budget, seed):
    longest = max(1, *lengths)
    pages = -(-longest // page)
    # Few distinct scores, so that ties are common.
    score = torch.randint(0, 4, (len(lengths), 2, pages), generator=torch.Generator().manual_seed(seed)).float()
    counts = [max(1, budget // page)] * len(lengths)
    index, is_kept = top_pages(score, counts, page, torch.tensor(lengths))
    assert index.min() >= 0
    assert index.max() < pages * page
    for b, n in enumerate(lengths):
        for h in range(2):
            filled = -(-n // page)
            expected = [
                i for p in best(score[b, h, :filled].tolist(), counts[b]) for i in range(p * page, p * page + page)
            ]
            assert index[b, h][is_kept[b, h]].tolist() == [i for i in expected if i < n]
            assert not is_kept[b, h][int(is_kept[b, h].sum()) :].any()


def test_single_keys_agree_with_top_keys(view):
    score = Mage().observe(view).score
    visible = view.is_visible[:, None].expand_as(score)
    index, is_kept = top_keys(score, 9, visible)
    mine, kept = top_pages(score, [9, 9], 1, torch.tensor(LENGTHS))
    assert torch.equal(index, mine)
    assert torch.equal(is_kept, kept)


@pytest.fixture
def document(tiny_lm, prompts):
    """A model of four layers, its cache with rows of 24, 8 and 16 tokens, and an all-[MASK] block after each."""
    lm = tiny_lm(num_layers=4)
    cache = PrefixCache.for_model(lm.model, 3, 32)
    extend(lm.model, cache, prompts((24, 8, 16)), 4)
    blocks = torch.full((3, 4), 63)
    blocks[:, 0] = 5
    return lm, cache, blocks


@pytest.mark.parametrize("name", RULES)
def test_a_prefix_within_the_budget_is_exact_bit_for_bit(document, name):
    lm, cache, blocks = document
    exact = block_forward(lm.model, cache, blocks)
    for levers in [Levers(), Levers(residual=True, reselect_at=(1,), refresh="draft")]:
        steps = BlockSteps(lm.model, cache.prefix(), make_rule(name, budget=24), levers, 4)
        for _ in range(4):
            hidden, is_sparse = steps.forward(blocks)
            assert torch.equal(hidden, exact)
            assert not any(is_sparse)
            assert not steps.wants_draft


@pytest.mark.parametrize("name", [n for n in RULES if n != "exact"])
def test_a_row_within_the_budget_keeps_its_whole_prefix(document, name):
    lm, cache, blocks = document
    rule = make_rule(name, budget=8, dense_layers=1)
    _, choice = choose_forward(lm.model, cache.prefix(), blocks, rule)
    assert choice.selection.as_mask(24)[:, 1, :, :8].all()
    exact = block_forward(lm.model, cache, blocks)
    if rule.chooses == "layer":
        sparse = block_forward(lm.model, cache, blocks, rule=rule)
    else:
        sparse = block_forward(lm.model, cache, blocks, selection=choice.selection)
    assert (sparse[1] - exact[1]).abs().max() < 1e-5
    assert (sparse[0] - exact[0]).abs().max() > 1e-3
    assert (sparse[2] - exact[2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ONCE)
def test_a_sparse_step_is_blind_to_what_was_not_chosen(document, name):
    lm, cache, blocks = document
    _, choice = choose_forward(lm.model, cache.prefix(), blocks, make_rule(name, budget=8, dense_layers=1))
    sparse = block_forward(lm.model, cache, blocks, selection=choice.selection)
    dropped = ~choice.selection.as_mask(24)
    assert dropped.any()
    cache.keys[1:, :, :, :24][dropped] = 1e4
    cache.values[1:, :, :, :24][dropped] = 1e4
    assert torch.equal(block_forward(lm.model, cache, blocks, selection=choice.selection), sparse)


def test_the_oracle_is_mage_with_a_look_at_every_step(document):
    lm, cache, blocks = document
    mage, oracle = (make_rule(name, budget=8, dense_layers=1) for name in ("mage", "oracle"))
    steps = BlockSteps(lm.model, cache.prefix(), oracle, Levers(), 4)
    for fill in (63, 7, 9):
        blocks[:, 2:] = fill
        _, choice = choose_forward(lm.model, cache.prefix(), blocks, mage)
        by_mage = block_forward(lm.model, cache, blocks, selection=choice.selection)
        assert torch.equal(steps.forward(blocks)[0], by_mage)


def test_the_residual_makes_the_choosing_step_exact(document):
    lm, cache, blocks = document
    rule = make_rule("mage", budget=8, dense_layers=1)
    exact, choice = choose_forward(lm.model, cache.prefix(), blocks, rule, residual=True)
    merged = block_forward(lm.model, cache, blocks, selection=choice.selection, residual=choice.residual)
    without = block_forward(lm.model, cache, blocks, selection=choice.selection)
    assert (merged - exact).abs().max() < 1e-4
    assert (without - exact).abs().max() > 1e-2


def test_steps_follow_the_rule_and_its_levers(document):
    lm, cache, blocks = document

    def kinds(name, levers=None, **options):
        steps = BlockSteps(lm.model, cache.prefix(), make_rule(name, budget=8, **options), levers or Levers(), 10)
        said = []
        for _ in range(5):
            _, is_sparse = steps.forward(blocks)
            assert is_sparse[1] is False
            said.append("s" if is_sparse[0] else "e")
            if steps.wants_draft:
                steps.refresh(blocks)
                said.append("r")
        return "".join(said)

    assert kinds("exact") == "eeeee"
    assert kinds("mage") == kinds("mage-v1") == kinds("mean-query") == "essss"
    assert kinds("sparse-dllm") == "eesss"
    assert kinds("sparsed") == "eesss"
    assert kinds("sparsed", skip=0.4) == "eeees"
    assert kinds("quest") == kinds("oracle") == kinds("tidal", correction_layer=3) == "sssss"
    assert kinds("mage", Levers(refresh="draft")) == "erssss"
    assert kinds("mage", Levers(reselect_at=(2, 3))) == "esees"


def test_refresh_and_union(document):
    lm, cache, blocks = document
    rule = make_rule("mage", budget=8)
    draft = torch.randint(2, 60, (3, 4), generator=torch.Generator().manual_seed(8))
    _, at_mask = choose_forward(lm.model, cache.prefix(), blocks, rule)
    _, at_draft = choose_forward(lm.model, cache.prefix(), draft, rule)
    picked = {}
    for how in ("draft", "union"):
        steps = BlockSteps(lm.model, cache.prefix(), rule, Levers(refresh=how), 4)
        steps.forward(blocks)
        steps.refresh(draft)
        picked[how] = steps.choice.selection.as_mask(24)
        assert (picked[how].sum(-1) == 8).all()
    assert torch.equal(picked["draft"], at_draft.selection.as_mask(24))
    either = at_mask.selection.as_mask(24) | at_draft.selection.as_mask(24)
    assert not (picked["union"] & ~either).any()
    assert not torch.equal(picked["union"], picked["draft"])


def test_recall(document):
    lm, cache, blocks = document
    rule = make_rule("mage", budget=6)
    _, first = choose_forward(lm.model, cache.prefix(), blocks, rule)
    later = blocks.clone()
    later[:, 1:] = 9
    _, second = choose_forward(lm.model, cache.prefix(), later, rule)
    recall = first.selection.recall(second.selection)
    for layer in range(2):
        for b in range(3):
            for h in range(2):
                mine = set(first.selection.index[layer, b, h][first.selection.is_kept[layer, b, h]].tolist())
                theirs = set(second.selection.index[layer, b, h][second.selection.is_kept[layer, b, h]].tolist())
                assert recall[layer, b, h] == pytest.approx(len(mine & theirs) / len(theirs))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mgae", {}, "unknown selection rule 'mgae'; did you mean 'mage'"),
        ("mage", {"budget": 0}, "budget 0: a sparse step needs at least one key"),
        ("mage", {"budget": -3}, "budget -3"),
        ("exact", {"budget": 0}, "budget 0"),
        ("mage", {"dense_layers": -1}, "dense_layers -1 is negative"),
        ("mage", {"follow": -1}, "follow -1 is negative"),
        ("mage", {"layer_budgets": {1: 5}}, "layer 1 is one of the 2 dense ones"),
        ("mage", {"layer_budgets": {2: 0}}, "0 keys of layer 2 are too few"),
        ("mage", {"layer_budgets": ((2, 3), (2, 4))}, "name a layer twice"),
        ("quest", {"follow": 2}, "keeps pages of 16 keys"),
        ("mage", {"budget": 8, "sinks": 4, "recent": 5}, "exceed the budget of 8"),
        ("mage", {"page_size": 16}, "'mage' has no option 'page_size'"),
        ("sparsed", {"ratio": 0.0}, "ratio 0.0"),
        ("sparsed", {"skip": 1.0}, "skip 1.0"),
        ("sparse-dllm", {"pool": 2}, "pool 2 must be odd"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_rule(name, **options)


def test_a_rule_keeps_its_own_options():
    assert make_rule(Mage(budget=7)) == Mage(budget=7)
    with pytest.raises(ValueError, match="give budget to the 'mage' rule itself"):
        make_rule(Mage(budget=7), budget=8)


def test_a_rule_that_needs_an_exact_look_cannot_choose_within_a_step(document):
    lm, cache, blocks = document
    with pytest.raises(ValueError, match="'oracle' chooses from an exact forward"):
        block_forward(lm.model, cache, blocks, rule=make_rule("oracle", budget=8))


def test_no_layer_left_to_be_sparse(document):
    lm, cache, blocks = document
    with pytest.raises(ValueError, match="dense_layers 4 leave no layer"):
        choose_forward(lm.model, cache.prefix(), blocks, make_rule("mage", budget=8, dense_layers=4))
