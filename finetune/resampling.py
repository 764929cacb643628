"""What resampled values of a statistic say, when whole prompts are drawn again: an interval, and how far it is from zero.

The spread of resampled means is that of n values with their own mean in the middle, and their tails are the normal distribution's. With
few prompts both are too small: a plain percentile interval of 5 prompts holds the truth 5 times in 6, not 19 in 20. So the interval
is cut further out, where Student's distribution puts it (the "expanded percentile interval" of Hesterberg, "What Teachers Should Know
About the Bootstrap", 2015), which for many prompts is the plain one.

Prompts that all say the same leave nothing to resample: an interval without width would claim certainty, so there is none, and
only a share, which has a smallest and a largest value, has another (`interval_of_alike`).
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np

COVERAGE = 0.95
# With fewer prompts no resampling tells how far the next one may lie.
FEWEST_PROMPTS = 5
GRID = 20_001
# What is left of equal numbers by rounding: in units of the statistic, and of its size.
ROUNDING, RELATIVE_ROUNDING = 1e-12, 1e-9


def _beyond(angle: float, freedom: int) -> float:
    """The integral of cos^(freedom - 1) from `angle` to a right angle: Student's tail with t = sqrt(freedom) tan(angle)."""
    angles = np.linspace(angle, math.pi / 2, GRID)
    return float(np.trapezoid(np.cos(angles).clip(0) ** (freedom - 1), angles))


def student_tails(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's distribution with `freedom` degrees of freedom."""
    return _beyond(math.atan2(abs(t), math.sqrt(freedom)), freedom) / _beyond(0.0, freedom)


@cache
def cut_off(prompts: int) -> float:
    """The share of resampled values that lies outside of the interval at either end, for a statistic of that many prompts."""
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tails(math.sqrt(prompts - 1) * math.tan(middle), prompts - 1) > 1 - COVERAGE else (low, middle)
    return NormalDist().cdf(-math.sqrt(prompts) * math.tan(low))


def are_alike(values: np.ndarray) -> bool:
    """Whether they differ by no more than rounding."""
    return bool(np.ptp(values) <= ROUNDING + RELATIVE_ROUNDING * np.abs(values).max())


def why_no_interval(prompts: int) -> str:
    """In words, where `interval` gave None for that many prompts."""
    if not prompts:
        return "no prompt of its kind"
    return "too few prompts" if prompts < FEWEST_PROMPTS else "all prompts alike"


def interval_of_alike(value: float, prompts: int, lowest: float, highest: float) -> tuple[float, float]:
    """(low, high) at `COVERAGE` of the mean of something between `lowest` and `highest` of which all prompts said `value`.

    A share of more than 1 - 0.025^(1 / prompts) of prompts that say otherwise would have shown itself (Clopper and Pearson 1934, no
    event in n trials); those are taken to say the lowest, or the highest.
    """
    unseen = 1 - ((1 - COVERAGE) / 2) ** (1 / prompts)
    return value - unseen * (value - lowest), value + unseen * (highest - value)


def interval(samples: np.ndarray, prompts: int) -> tuple[float, float] | None:
    """(low, high) at `COVERAGE` from the resampled values of a statistic; None for fewer than `FEWEST_PROMPTS` prompts, and
    where all prompts are alike."""
    if prompts < FEWEST_PROMPTS or not len(samples) or are_alike(samples):
        return None
    share = cut_off(prompts)
    low, high = np.quantile(samples, [share, 1 - share])
    return float(low), float(high)


def p_value(value: float, samples: np.ndarray, prompts: int) -> float:
    """Two-sided p of "the statistic is zero": Student's, with the spread of the resampled values as its standard error.

    Never below what the signs of that many prompts could show if nothing but their direction were known: 2^(1 - prompts).
    """
    if are_alike(samples):
        return 1.0 if abs(value) <= ROUNDING else 2.0 ** (1 - prompts)
    error = float(samples.std()) * math.sqrt(prompts / (prompts - 1))
    return min(1.0, max(student_tails(value / error, prompts - 1), 2.0 ** (1 - prompts)))
