"""The learning rate by step."""

import pytest

from finetune.training.lr_schedules import FINAL_FACTOR, SCHEDULES, learning_rate_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_to_one(schedule):
    factors = [learning_rate_factor(schedule, step, 100, 10) for step in range(10)]
    assert factors == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize("schedule, last", [("constant", 1.0), ("linear", FINAL_FACTOR), ("cosine", FINAL_FACTOR)])
def test_the_last_step_ends_where_the_schedule_says(schedule, last):
    assert learning_rate_factor(schedule, 99, 100, 10) == pytest.approx(last)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_schedule_never_rises_after_the_warm_up(schedule):
    factors = [learning_rate_factor(schedule, step, 50, 5) for step in range(5, 50)]
    assert factors == sorted(factors, reverse=True) and factors[0] == pytest.approx(1)


def test_cosine_is_half_way_down_in_the_middle():
    assert learning_rate_factor("cosine", 50, 101, 0) == pytest.approx((1 + FINAL_FACTOR) / 2)


def test_one_step_runs_need_no_special_care():
    assert learning_rate_factor("cosine", 0, 1, 0) == 1.0
