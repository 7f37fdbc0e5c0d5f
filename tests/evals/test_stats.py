"""Intervals against known answers."""

import numpy as np
import pytest

from mage_tune.evals.stats import estimate, paired_difference, unit_means


def test_the_interval_of_many_normal_values_is_the_textbook_one():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    found = estimate(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert found.n == 400


def test_equal_values_leave_no_doubt():
    found = estimate([0.5] * 9)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [estimate(rng.exponential(1.0, 24), seed=i) for i in range(150)]
    covered = np.mean([f.low <= 1.0 <= f.high for f in found])
    assert 0.85 <= covered <= 0.99  # percentile intervals of skewed values are a little short


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).random(12)
    assert estimate(values, seed=3) == estimate(values, seed=3)
    assert estimate(values, seed=3) != estimate(values, seed=4)


def test_unit_means_average_within_units_in_order_of_their_number():
    assert unit_means([1.0, 5.0, 3.0, 7.0, 2.0], [2, 0, 2, 0, 1]).tolist() == [6.0, 2.0, 2.0]


def test_repeating_blocks_of_a_window_adds_no_certainty():
    per_window = np.random.default_rng(3).normal(size=10)
    blocks, windows = np.repeat(per_window, 20), np.repeat(np.arange(10), 20)
    honest, naive = estimate(unit_means(blocks, windows)), estimate(blocks)
    plain = estimate(per_window)
    assert (honest.mean, honest.low, honest.high) == pytest.approx((plain.mean, plain.low, plain.high))
    assert naive.high - naive.low < 0.4 * (honest.high - honest.low)


def test_pairing_sees_what_windows_have_in_common():
    rng = np.random.default_rng(4)
    before = rng.normal(3.5, 0.5, 16)  # windows differ much more than the arms
    after = before - 0.05 + rng.normal(0, 0.02, 16)
    assert estimate(after).high > estimate(before).low
    change = paired_difference(after, before)
    assert change.mean == pytest.approx((after - before).mean())
    assert change.low < change.mean < change.high < 0
    back = paired_difference(before, after)
    assert (back.mean, back.low, back.high) == pytest.approx((-change.mean, -change.high, -change.low), abs=2e-3)


def test_all_answers_right_is_not_certainty():
    found = estimate(np.ones(16, dtype=bool))
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(16 / (16 + 1.959964**2))  # Wilson's interval at share 1


def test_wilsons_interval_of_a_known_share():
    found = estimate(np.arange(10) < 5)
    assert (found.low, found.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # R: prop.test(5, 10, correct = FALSE)


@pytest.mark.parametrize(("won", "lost", "is_clear"), [(0, 0, False), (4, 0, False), (8, 0, True), (8, 6, False)])
def test_paired_answers_need_more_than_a_few_wins(won, lost, is_clear):
    before, after = np.zeros(16, dtype=bool), np.zeros(16, dtype=bool)
    after[:won] = True
    before[won : won + lost] = True
    change = paired_difference(after, before)
    assert change.mean == pytest.approx((won - lost) / 16)
    assert change.low < change.high
    assert (change.low > 0) == is_clear
    back = paired_difference(before, after)
    assert (back.low, back.high) == pytest.approx((-change.high, -change.low))


def test_what_is_not_paired_or_not_there_is_refused():
    with pytest.raises(ValueError, match="not paired: 3 measurements against 2"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no measurements"):
        estimate([])
    with pytest.raises(ValueError, match="no measurements"):
        paired_difference(np.empty(0, dtype=bool), np.empty(0, dtype=bool))
