"""Intervals of few prompts hold the truth as often as those of many; p-values are Student's."""

import numpy as np
import pytest
from scipy import stats

from finetune.resampling import FEWEST_PROMPTS, cut_off, interval, interval_of_alike, p_value, student_tails


@pytest.mark.parametrize("freedom", [1, 4, 9, 59, 2000])
@pytest.mark.parametrize("t", [0.0, 0.5, 2.0, 12.0])
def test_the_tails_are_students(t, freedom):
    assert student_tails(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-3, abs=1e-300)
    assert student_tails(-t, freedom) == student_tails(t, freedom)


def test_the_cut_is_the_published_one_and_that_of_a_plain_percentile_interval_for_many():
    for prompts in (5, 8, 20, 100):
        assert cut_off(prompts) == pytest.approx(stats.norm.cdf(-(prompts / (prompts - 1)) ** 0.5 * stats.t.ppf(0.975, prompts - 1)), rel=1e-4)
    assert cut_off(5000) == pytest.approx(0.025, rel=5e-3)


def resampled(values, random, draws=2000):
    return random.choice(values, (draws, len(values))).mean(1)


@pytest.mark.parametrize("prompts", [5, 8, 12])
def test_few_prompts_are_covered_as_often_as_it_says(prompts):
    """The plain percentile interval of 5 holds the truth 83 times in 100."""
    random, held, tried = np.random.default_rng(1), 0, 400
    for _ in range(tried):
        low, high = interval(resampled(random.normal(0.3, 1, prompts), random), prompts)
        held += low <= 0.3 <= high
    assert held / tried > 0.92


def test_fewer_than_that_have_no_interval():
    assert interval(np.zeros(10), FEWEST_PROMPTS - 1) is None and interval(np.array([]), 30) is None


@pytest.mark.parametrize("value", [0.0, 0.3, 0.1 + 0.2])
def test_prompts_that_are_alike_have_no_interval_of_no_width(value):
    """It said 0.3 to 0.3 at 95 %; the means of equal numbers differ in their last bits."""
    values = np.full(12, value)
    assert interval(resampled(values, np.random.default_rng(0)), 12) is None
    assert p_value(value, resampled(values, np.random.default_rng(0)), 12) == (1.0 if value == 0 else 2**-11)


def test_a_share_that_all_prompts_agree_on_has_the_exact_interval():
    low, high = interval_of_alike(1.0, 8, 0.0, 1.0)
    assert (low, high) == (pytest.approx(stats.binomtest(8, 8).proportion_ci(method="exact").low), 1.0)
    assert interval_of_alike(0.0, 60, 0.0, 1.0) == (0.0, pytest.approx(stats.binomtest(0, 60).proportion_ci(method="exact").high))


def test_alike_differences_leave_out_zero_just_where_their_signs_do():
    for prompts in range(FEWEST_PROMPTS, 10):
        assert (interval_of_alike(1.0, prompts, -1.0, 1.0)[0] > 0) == (p_value(1.0, np.ones(10), prompts) < 0.05)


def test_the_p_value_of_a_mean_is_the_paired_t_test():
    random = np.random.default_rng(2)
    for prompts in (12, 40):
        values = random.normal(0.4, 1, prompts)
        assert p_value(values.mean(), resampled(values, random, 20_000), prompts) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=0.15)


def test_without_any_spread_the_number_of_prompts_decides():
    assert p_value(0.0, np.zeros(10), 9) == 1.0
    assert p_value(1.0, np.ones(10), 5) == 2**-4
