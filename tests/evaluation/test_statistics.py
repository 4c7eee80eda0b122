import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.errors import UserError
from t5x_domain.evaluation import statistics
from t5x_domain.evaluation.statistics import hierarchical_bootstrap, multiplicity, over_seeds, paired_bootstrap


def correlated(rng, n, shift=0.0, rho=0.6):
    """Two per-item values of variance 1 and correlation rho; the second is `shift` larger in the mean."""
    base = rng.standard_normal(n)
    return base, shift + rho * base + math.sqrt(1 - rho**2) * rng.standard_normal(n)


def test_two_models_that_answer_alike_tie_at_no_difference():
    values = np.random.default_rng(0).random(50)
    comparison = paired_bootstrap(values, values)
    assert dataclasses.astuple(comparison) == (values.mean(), values.mean(), 0, 0, 0, 10_000, 50, "tie", 1.0)


def test_round_off_is_no_difference():
    # 0.1 + 0.2 is 0.30000000000000004 and not 0.3: a difference of 4e-17 in every resample.
    comparison = paired_bootstrap([0.3] * 3, [0.1 + 0.2] * 3)
    assert (comparison.low, comparison.high, comparison.outcome, comparison.p_value) == (0, 0, "tie", 1.0)


@pytest.mark.parametrize(("lower_is_better", "better", "worse"), [(False, "win", "loss"), (True, "loss", "win")])
def test_a_constant_difference_is_found_exactly(lower_is_better, better, worse):
    # Adding 1/4 to items that are multiples of 1/8 is exact in floating point, and no resample can show another.
    values = np.random.default_rng(0).integers(0, 9, 64) / 8
    up = paired_bootstrap(values, values + 0.25, lower_is_better=lower_is_better)
    assert (up.difference, up.low, up.high, up.outcome) == (0.25, 0.25, 0.25, better)
    assert up.p_value == 2 / 10_001
    down = paired_bootstrap(values, values - 0.25, lower_is_better=lower_is_better)
    assert (down.difference, down.low, down.high, down.outcome) == (-0.25, -0.25, -0.25, worse)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * 2), min_size=2, max_size=20))
def test_swapping_the_models_mirrors_the_comparison(pairs):
    base, adapted = np.array(pairs).T
    there, back = paired_bootstrap(base, adapted, resamples=200), paired_bootstrap(adapted, base, resamples=200)
    assert there.difference == pytest.approx(adapted.mean() - base.mean(), abs=1e-9)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    assert there.p_value == back.p_value
    assert {there.outcome, back.outcome} in ({"win", "loss"}, {"tie"})


def test_agrees_with_scipy():
    from scipy import stats

    base, adapted = correlated(np.random.default_rng(1), 150, shift=0.1)
    ours = paired_bootstrap(base, adapted)
    theirs = stats.bootstrap(
        (base, adapted),
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    # Either end is the 2.5 % quantile of R = 10,000 nearly normal draws of deviation s, hence has the standard error
    # s sqrt(p (1 - p) / R) / phi(1.96), phi(1.96) = 0.0584; the two are independent; 4 errors.
    s = np.std(adapted - base) / math.sqrt(150)
    tolerance = 4 * math.sqrt(2) * s * math.sqrt(0.025 * 0.975 / 10_000) / 0.0584
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)
    assert tolerance < 0.2 * (ours.high - ours.low)  # the comparison means something


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_intervals_cover_the_truth_as_often_as_they_say(shift):
    # n = 200 items, 500 simulations. The percentile interval of a normal mean is that of z with the plug-in deviation:
    # its coverage falls short of 95 % by O(1/n): P(|t_199| < 1.96 sqrt(199/200)) = 0.9476. Counts are binomial:
    # deviation sqrt(500 * .05 * .95) = 4.9; 4 deviations: 474 +- 20. The 1,000 resamples blur an end by 0.005 / 0.0584
    # of a deviation, of second order for the coverage (< 0.1 %).
    rng = np.random.default_rng(3)
    comparisons = [paired_bootstrap(*correlated(rng, 200, shift), resamples=1000, seed=i) for i in range(500)]
    covered = sum(c.low <= shift <= c.high for c in comparisons)
    assert 454 <= covered <= 494
    outcomes = [c.outcome for c in comparisons]
    if shift == 0:  # the same count seen as false positives, which fall to either side alike: 12.5 +- 4 * 3.5
        assert outcomes.count("tie") == covered
        assert max(outcomes.count("win"), outcomes.count("loss")) <= 27
    else:
        # Power: the difference has deviation sqrt(2 - 1.2) / sqrt(200) = 0.0632, 0.2 is 3.16 of them:
        # P(z > 1.96 - 3.16) = 0.885; 442 of 500 +- 4 * 7.1.
        assert 413 <= outcomes.count("win") <= 471
        assert outcomes.count("loss") == 0


def test_pairing_takes_out_what_the_items_share():
    # rho = 0.99: the paired interval has the deviation sqrt(2 - 1.98) = 0.141 of a difference, the unpaired sqrt(2).
    base, adapted = correlated(np.random.default_rng(4), 400, rho=0.99)
    width = paired_bootstrap(base, adapted).high - paired_bootstrap(base, adapted).low
    # sample deviation of 400 values is within 4 / sqrt(800) = 14 % of the true one, and the ends within 4 %.
    assert width == pytest.approx(2 * 1.96 * math.sqrt(0.02 / 400), rel=0.2)


def test_a_statistic_of_sums_is_recomputed_on_every_resample():
    # A ratio of sums, e.g. precision = correct / predicted, is not the mean of ratios: here 5 / 8 against 5 / 10.
    base = np.array([[1.0, 2.0], [1.0, 3.0], [2.0, 2.0], [1.0, 3.0]])
    adapted = np.array([[1.0, 2.0], [2.0, 2.0], [1.0, 1.0], [1.0, 3.0]])
    comparison = paired_bootstrap(base, adapted, statistic=lambda totals: totals[..., 0] / totals[..., 1])
    assert (comparison.base, comparison.adapted) == (5 / 10, 5 / 8)
    # Four items have 4^4 = 256 ordered resamples; all of them give the exact distribution of the difference.
    draws = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    exact = [np.divide(*adapted[d].sum(0)) - np.divide(*base[d].sum(0)) for d in draws]
    assert comparison.low == pytest.approx(np.quantile(exact, 0.025), abs=0.02)
    assert comparison.high == pytest.approx(np.quantile(exact, 0.975), abs=0.02)


def test_the_interval_does_not_depend_on_the_size_of_a_chunk(monkeypatch):
    base, adapted = correlated(np.random.default_rng(5), 30)
    whole = paired_bootstrap(base, adapted)
    assert paired_bootstrap(base, adapted, seed=1) != whole
    monkeypatch.setattr(statistics, "_CHUNK", 7 * 30)  # 7 resamples a chunk
    chunked = paired_bootstrap(base, adapted)
    assert (chunked.low, chunked.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


@pytest.mark.parametrize("items", [0, 1])
def test_too_few_items_are_refused(items):
    with pytest.raises(UserError, match="at least two"):
        paired_bootstrap(np.ones(items), np.ones(items))


def test_values_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match="adapted model is NaN"):
        paired_bootstrap([0.0, 1.0], [0.0, math.nan])
    with pytest.raises(UserError, match="2 test items, the adapted one 3"):
        paired_bootstrap([0.0, 1.0], [0.0, 1.0, 1.0])
    with pytest.raises(UserError, match="resamples = 0"):
        paired_bootstrap([0.0, 1.0], [0.0, 1.0], resamples=0)
    with pytest.raises(UserError, match="at least two of each model"):
        hierarchical_bootstrap(np.ones((1, 5)), np.ones((2, 5)))
    with pytest.raises(UserError, match="at least two of each model"):
        over_seeds([1.0], [1.0, 2.0])
    with pytest.raises(UserError, match="cannot be paired"):
        over_seeds([1.0, 2.0, 3.0], [1.0, 2.0], paired=True)


def test_seeds_and_items_both_widen_the_interval():
    # Values m_s + e_i: seeds of deviation 0.3 (5 each model), items of deviation 1 (100) that differ between models.
    # Plug-in variances of the resampled difference, from the drawn values themselves: var(m)/5 for each model, and
    # var(e' - e)/100. 10,000 resamples give a width to some 2 %.
    rng = np.random.default_rng(6)
    seeds, items = rng.normal(0, 0.3, (2, 5)), rng.normal(0, 1, (2, 100))
    base, adapted = seeds[..., None] + items[:, None, :]
    both = hierarchical_bootstrap(base, adapted)
    deviation = math.sqrt(seeds.var(axis=1).sum() / 5 + np.var(items[1] - items[0]) / 100)
    # The bootstrap mean of five seeds is not quite normal; its kurtosis moves a 2.5 % quantile by a few per cent.
    assert both.high - both.low == pytest.approx(2 * 1.96 * deviation, rel=0.06)
    assert both.difference == pytest.approx(adapted.mean() - base.mean())
    only_items = paired_bootstrap(base.mean(0), adapted.mean(0))
    assert both.high - both.low > 1.1 * (only_items.high - only_items.low)


def test_seeds_that_agree_add_nothing():
    base, adapted = correlated(np.random.default_rng(7), 40)
    repeated = hierarchical_bootstrap(np.tile(base, (3, 1)), np.tile(adapted, (3, 1)))
    once = paired_bootstrap(base, adapted)
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high), abs=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_over_seeds_is_the_t_test(paired):
    from scipy import stats

    rng = np.random.default_rng(8)
    base, adapted = rng.normal(0.70, 0.02, 5), rng.normal(0.72, 0.01, 5)
    theirs = stats.ttest_rel(adapted, base) if paired else stats.ttest_ind(adapted, base, equal_var=False)
    ours = over_seeds(base, adapted, paired=paired)
    assert ours.p_value == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval()))
    assert ours.difference == adapted.mean() - base.mean()
    assert ours.items == 5


def test_seeds_without_variance():
    same = over_seeds([0.5, 0.5], [0.5, 0.5])
    assert (same.low, same.high, same.outcome, same.p_value) == (0, 0, "tie", 1.0)
    better = over_seeds([0.5, 0.5], [0.25, 0.25], lower_is_better=True)
    assert (better.low, better.high, better.outcome, better.p_value) == (-0.25, -0.25, "win", 0.0)


def test_holm_by_hand():
    # Holm 1979: sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made monotone: .04 .06 .06 .06.
    assert multiplicity([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert multiplicity([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert multiplicity([]).shape == (0,)
    with pytest.raises(UserError, match="within 0 and 1"):
        multiplicity([0.5, math.nan])
