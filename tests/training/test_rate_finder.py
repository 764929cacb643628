"""Choosing a learning rate from the curve of a range test."""

import math

import pytest

from finetune.training.rate_finder import smoothed, steepest

RATES = [1e-6 * 10 ** (step / 12) for step in range(72)]


def fall(rate, where):
    """Flat, down around `where`, and up again two powers of ten later."""
    return 1 - 0.5 / (1 + math.exp(-3 * math.log10(rate / where))) + math.exp(4 * (math.log10(rate / where) - 2.5))


@pytest.mark.parametrize("where", [1e-4, 1e-3, 1e-2])
def test_the_rate_is_taken_where_the_loss_falls_fastest(where):
    assert steepest(RATES, [fall(rate, where) for rate in RATES]) == pytest.approx(where, rel=0.3)


def test_a_loss_that_only_rises_gives_no_rate():
    assert steepest(RATES, [1 + step / 72 for step in range(72)]) is None


def test_smoothing_does_not_move_the_curve():
    assert smoothed([float(step) for step in range(20)]) == [float(step) for step in range(20)]
    assert max(smoothed([0.0] * 10 + [5.0] + [0.0] * 10)) == 1.0
