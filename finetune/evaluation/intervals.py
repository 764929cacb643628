"""Intervals by resampling prompts: pictures of one prompt are not independent, so prompts are what is drawn again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from finetune import resampling
from finetune.randomness import stable_seed

RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """low, high: of `resampling.interval`, None where there are too few prompts or all are alike.  p: two-sided p-value of "zero"."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    prompts: int

    @property
    def absent(self) -> str | None:
        """Why there is no interval, or None where there is one."""
        return None if self.low is not None else resampling.why_no_interval(self.prompts)


def per_prompt(values: np.ndarray, prompt_ids: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Means over the seeds of each prompt, pictures without a value left out; prompts without any value are left out."""
    ids = np.array(prompt_ids)
    names = [name for name in dict.fromkeys(prompt_ids) if np.isfinite(values[ids == name]).any()]
    return names, np.array([np.nanmean(values[ids == name]) for name in names])


def _draws(count: int, purpose: str) -> np.ndarray:
    """(RESAMPLES, count) indices of prompts; the same for the same purpose, so that reports do not change by themselves."""
    return np.random.default_rng(stable_seed(0, f"bootstrap {purpose}", count)).integers(0, count, (RESAMPLES, count))


def _from_samples(value: float, samples: np.ndarray, prompts: int, bounds: tuple[float, float] | None = None) -> Interval:
    samples = samples[np.isfinite(samples)]
    if prompts < resampling.FEWEST_PROMPTS or not len(samples):
        return Interval(value, None, None, None, prompts)
    ends = resampling.interval(samples, prompts) or (resampling.interval_of_alike(value, prompts, *bounds) if bounds else (None, None))
    return Interval(value, *ends, resampling.p_value(value, samples, prompts), prompts)


def bootstrap_mean(values: np.ndarray, prompt_ids: Sequence[str], purpose: str = "mean", bounds: tuple[float, float] | None = None) -> Interval:
    """The mean over prompts of each prompt's mean over seeds, with its interval. values: (n,) by picture, NaN is no value.

    bounds: least and largest value that there can be, where there are such: prompts that are all alike have an interval then.
    """
    names, means = per_prompt(values, prompt_ids)
    if not names:
        return Interval(math.nan, None, None, None, 0)
    return _from_samples(float(means.mean()), means[_draws(len(means), purpose)].mean(1), len(means), bounds)


def bootstrap_set(difference: Callable[[np.ndarray], float], applies: np.ndarray, prompt_ids: Sequence[str], purpose: str = "set") -> Interval:
    """The same for a number that only a set of pictures has. difference: picture indices (with repeats) -> number."""
    ids = np.array(prompt_ids)
    groups = [np.flatnonzero(applies & (ids == name)) for name in dict.fromkeys(prompt_ids)]
    groups = [group for group in groups if len(group)]
    if not groups:
        return Interval(math.nan, None, None, None, 0)
    value = difference(np.concatenate(groups))
    # A set statistic costs a matrix each; a tenth of the draws is enough for two digits of an interval.
    draws = _draws(len(groups), purpose)[: RESAMPLES // 10]
    samples = np.array([difference(np.concatenate([groups[index] for index in draw])) for draw in draws])
    return _from_samples(float(value), samples, len(groups))


def win_rate(differences: np.ndarray, better: str) -> tuple[float, float, float]:
    """(share of prompts won, low, high): ties count half; Wilson (1927) score interval with n = prompts."""
    signs = np.sign(differences) * (-1 if better == "lower" else 1)
    n, share = len(signs), float(((signs + 1) / 2).mean())
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, max(0.0, centre - half), min(1.0, centre + half)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) step-down adjustment over all tests that have a p-value; None stays None."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(tested):
        running = max(running, min(1.0, p * (len(tested) - rank)))
        adjusted[index] = running
    return adjusted
