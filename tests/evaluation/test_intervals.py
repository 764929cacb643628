"""Intervals cover what they promise when prompts are resampled, and the corrections give textbook values."""

import numpy as np
import pytest

from finetune.evaluation.intervals import bootstrap_mean, bootstrap_set, holm, per_prompt, win_rate


def simulated(random, prompts=30, seeds=3):
    """Differences with an effect of each prompt and of each picture; the truth is 0.3."""
    ids = [f"p{prompt}" for prompt in range(prompts) for _ in range(seeds)]
    by_prompt = np.repeat(random.normal(0.3, 0.5, prompts), seeds)
    return by_prompt + random.normal(0, 0.3, prompts * seeds), ids


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(10)
    hits = 0
    for _ in range(250):
        interval = bootstrap_mean(*simulated(random))
        hits += interval.low <= 0.3 <= interval.high
    assert 0.91 <= hits / 250 <= 0.98


def test_six_prompts_are_covered_as_often():
    """84 times in 100 without the widening; "better" was then said of chance 16 times in 100."""
    random, hits = np.random.default_rng(11), 0
    for _ in range(250):
        interval = bootstrap_mean(*simulated(random, prompts=6))
        hits += interval.low <= 0.3 <= interval.high
    assert 0.91 <= hits / 250 <= 0.99


def test_resampling_pictures_in_place_of_prompts_would_be_too_narrow():
    values, ids = simulated(np.random.default_rng(1))
    by_prompt, by_picture = bootstrap_mean(values, ids), bootstrap_mean(values, [str(index) for index in range(len(values))])
    assert by_prompt.high - by_prompt.low > 1.25 * (by_picture.high - by_picture.low)


def test_the_same_values_give_the_same_interval():
    values, ids = simulated(np.random.default_rng(2))
    assert bootstrap_mean(values, ids) == bootstrap_mean(values.copy(), list(ids))


def test_every_prompt_counts_once_however_many_seeds_it_has_and_missing_values_are_left_out():
    names, means = per_prompt(np.array([1.0, 3.0, 10.0, np.nan, np.nan]), ["a", "a", "b", "b", "c"])
    assert names == ["a", "b"] and means.tolist() == [2, 10]


def test_few_prompts_have_a_value_but_no_interval_and_none_has_neither():
    few = bootstrap_mean(np.array([1.0, 2.0]), ["a", "b"])
    assert (few.value, few.low, few.p, few.prompts) == (1.5, None, None, 2)
    none = bootstrap_mean(np.array([np.nan]), ["a"])
    assert np.isnan(none.value) and none.prompts == 0


def test_a_share_of_prompts_that_all_say_the_same_is_not_taken_for_certain():
    """No near-copy in 20 prompts was "0 to 0, 95 %"; a 17th of all prompts may still give one."""
    ids = [f"p{number}" for number in range(20)]
    none = bootstrap_mean(np.zeros(20), ids, bounds=(0.0, 1.0))
    assert none.low == 0 and none.high == pytest.approx(0.168, abs=1e-3) and none.absent is None
    unbounded = bootstrap_mean(np.full(20, 0.3), ids)
    assert (unbounded.low, unbounded.high, unbounded.absent) == (None, None, "all prompts alike")
    assert bootstrap_mean(np.zeros(3), ids[:3], bounds=(0.0, 1.0)).absent == "too few prompts"


def test_a_set_statistic_is_resampled_by_prompt():
    values, ids = simulated(np.random.default_rng(3))
    of_set = bootstrap_set(lambda chosen: float(values[chosen].mean()), np.ones(len(values), bool), ids)
    of_mean = bootstrap_mean(values, ids)
    assert of_set.value == pytest.approx(of_mean.value)
    assert of_set.high - of_set.low == pytest.approx(of_mean.high - of_mean.low, rel=0.25)


def test_win_rate_counts_ties_half_and_has_wilsons_interval():
    share, low, high = win_rate(np.array([1.0] * 8 + [-1.0] * 2), "higher")
    assert (share, low, high) == pytest.approx((0.8, 0.490, 0.943), abs=1e-3)
    assert win_rate(np.array([-1.0, 0.0]), "lower")[0] == 0.75


def test_holm_adjusts_step_by_step_and_leaves_gaps():
    assert holm([0.01, None, 0.04, 0.03]) == [0.03, None, 0.06, 0.06]
