"""Fit a linear Bradley-Terry head on frozen features and say honestly how good it is.

P(a beats b) = sigmoid(w . (f(a) - f(b))): logistic regression on feature differences, with a projection fitted and a ridge
penalty chosen inside each fold. Folds hold whole prompts, never single pairs: pairs of one prompt share pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from data_tools.errors import DataError

from finetune.preference.pairs import Pair
from finetune.randomness import python_random
from finetune.resampling import FEWEST_PROMPTS, are_alike, interval, interval_of_alike

PENALTIES = (0.03, 0.3, 3.0, 30.0, 300.0)
# With nine tenths of the prompts a head is nearly as good as with all: over 100 simulated sets of 40 prompts 10 folds said 73.4 %, 5 said
# 72.5 %, and the head of all prompts was right on 73.4 % of fresh pairs.
FOLDS = 10
MOST_DIRECTIONS = 64
# With fewer pairs a head is worth a best-of-N, not an optimisation against it.
FEW_PAIRS = 300


@dataclass(frozen=True)
class HeldOut:
    """Accuracy on pairs of prompts that the head was not fitted on, over all folds, with a 95 % interval that resamples
    prompts, None for fewer than `resampling.FEWEST_PROMPTS` of them; calibration_error: mean gap between stated and true probability in ten bins; ceiling: see `Trust`."""

    pairs: int
    prompts: int
    accuracy: float
    low: float | None
    high: float | None
    calibration_error: float
    log_loss: float


@dataclass(frozen=True)
class Projection:
    """Standardise, then rotate to the directions in which the pictures differ most. mean, scale: (D,); directions: (D, K)."""

    mean: np.ndarray
    scale: np.ndarray
    directions: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, D) -> (n, K)."""
        return ((features - self.mean) / self.scale) @ self.directions


@dataclass(frozen=True)
class Head:
    """score = (features projected) @ weights - offset, in units of log-odds."""

    projection: Projection
    weights: np.ndarray
    offset: float
    penalty: float
    held_out: HeldOut

    def score(self, features: np.ndarray) -> np.ndarray:
        """(n, D) -> (n,)."""
        return self.projection(features) @ self.weights - self.offset


def fit_head(features: Mapping[str, np.ndarray], pairs: Sequence[Pair], *, seed: int = 0) -> Head:
    """Fit on all pairs; `held_out` comes from folds over prompts.

    features: candidate id -> (D,).  pairs: with ties (probability 0.5), which soften the fit and count in no accuracy.
    Raises DataError with fewer than 2 prompts or 8 decided pairs.
    """
    decided = [pair for pair in pairs if pair.probability == 1.0]
    prompts = sorted({pair.prompt_id for pair in decided})
    if len(decided) < 8 or len(prompts) < 2:
        raise DataError(f"{len(decided)} decided pairs over {len(prompts)} prompts are too few to learn from and to test on", where="comparisons.jsonl", fix="rate more pairs: at least 8 over 2 prompts, better 300 over 20")
    matrix, prompt_of = np.stack(list(features.values())), _prompt_of(features, pairs)
    folds = _folds(prompts, min(FOLDS, len(prompts)), seed)
    stated = np.full(len(pairs), np.nan)
    for number, held in enumerate(folds):
        test = np.array([pair.prompt_id in held for pair in pairs])
        # The directions too are a fit: taken from all pictures they follow the held-out ones, and the accuracy is flattered.
        learned = np.array([prompt not in held for prompt in prompt_of])
        projection = fit_projection(matrix[learned], list(compress(prompt_of, learned)), len(decided))
        rows = _rows(features, projection(matrix), pairs)
        penalty = _choose_penalty(rows, pairs, ~test, [fold for place, fold in enumerate(folds) if place != number])
        stated[test] = rows.differences[test] @ _solve(rows, ~test, penalty)
    projection, everything = fit_projection(matrix, prompt_of, len(decided)), np.ones(len(pairs), bool)
    projected = projection(matrix)
    rows = _rows(features, projected, pairs)
    penalty = _choose_penalty(rows, pairs, everything, folds)
    weights = _solve(rows, everything, penalty)
    offset = float((projected @ weights).mean())
    return Head(projection, weights, offset, penalty, _held_out(stated, pairs, seed))


def _prompt_of(features: Mapping[str, np.ndarray], pairs: Sequence[Pair]) -> list[str]:
    """The prompt of each row of the feature matrix."""
    prompts = {item: pair.prompt_id for pair in pairs for item in (pair.better, pair.worse)}
    return [prompts.get(item, "") for item in features]


def fit_projection(matrix: np.ndarray, prompts: Sequence[str], pairs: int) -> Projection:
    """Principal directions of the features' differences within prompts; about twelve of `pairs` a direction.

    Pictures are only ever compared within a prompt. What differs between prompts is usually far larger and would drown it.
    Directions keep their relative strengths, so that the penalty holds down what hardly varies: that is mostly noise.
    """
    mean, centred = matrix.mean(0), matrix.astype(float).copy()
    for prompt in set(prompts):
        rows = [number for number, one in enumerate(prompts) if one == prompt]
        centred[rows] -= centred[rows].mean(0)
    scale = centred.std(0)
    scale = np.where(scale > 1e-6 * max(scale.max(initial=0.0), 1e-12), scale, np.inf)
    standard = centred / scale
    _, strength, directions = np.linalg.svd(standard, full_matrices=False)
    count = int(np.clip(pairs // 12, 4, MOST_DIRECTIONS))
    count = min(count, int((strength > 1e-4 * strength[0]).sum()))
    return Projection(mean, scale, directions[:count].T / (strength[0] / np.sqrt(len(matrix))))


@dataclass(frozen=True)
class _Rows:
    differences: np.ndarray
    target: np.ndarray
    weight: np.ndarray


def _rows(items: Iterable[str], projected: np.ndarray, pairs: Sequence[Pair]) -> _Rows:
    """items: whose features the rows of `projected` are."""
    row = {item: number for number, item in enumerate(items)}
    differences = projected[[row[pair.better] for pair in pairs]] - projected[[row[pair.worse] for pair in pairs]]
    return _Rows(differences, np.array([pair.probability for pair in pairs]), np.array([pair.weight for pair in pairs]))


def _folds(prompts: Sequence[str], count: int, seed: int) -> list[set[str]]:
    order = list(prompts)
    python_random(seed, "folds").shuffle(order)
    return [set(order[start::count]) for start in range(count)]


def _solve(rows: _Rows, chosen: np.ndarray, penalty: float) -> np.ndarray:
    """Newton's method on the penalised log loss; convex, so the answer is unique."""
    x, y, w = rows.differences[chosen], rows.target[chosen], rows.weight[chosen]
    weights = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -40, 40)))
        gradient = x.T @ (w * (p - y)) + penalty * weights
        step = np.linalg.solve(x.T @ (x * (w * p * (1 - p))[:, None]) + penalty * np.eye(len(weights)), gradient)
        weights -= step
        if np.abs(step).max(initial=0.0) < 1e-8:
            break
    return weights


def _choose_penalty(rows: _Rows, pairs: Sequence[Pair], allowed: np.ndarray, folds: Sequence[set[str]]) -> float:
    """The penalty with the lowest log loss over `folds`, looking at `allowed` pairs only."""
    if len(folds) < 2:
        return PENALTIES[len(PENALTIES) // 2]
    losses = []
    for penalty in PENALTIES:
        total = 0.0
        for held in folds:
            test = allowed & np.array([pair.prompt_id in held for pair in pairs])
            train = allowed & ~test
            if test.any() and train.any():
                total += _log_loss(rows.differences[test] @ _solve(rows, train, penalty), rows.target[test])
        losses.append(total)
    return PENALTIES[int(np.argmin(losses))]


def _log_loss(margin: np.ndarray, target: np.ndarray) -> float:
    return float((np.logaddexp(0, margin) - target * margin).sum())


def _held_out(stated: np.ndarray, pairs: Sequence[Pair], seed: int) -> HeldOut:
    use = np.array([pair.probability == 1.0 for pair in pairs]) & ~np.isnan(stated)
    margin, prompts = stated[use], [pair.prompt_id for pair, used in zip(pairs, use, strict=True) if used]
    right = np.where(margin == 0, 0.5, (margin > 0).astype(float))
    low, high = prompt_interval(right, prompts, seed) or (None, None)
    return HeldOut(len(right), len(set(prompts)), float(right.mean()), low, high, calibration_error(margin), _log_loss(margin, np.ones_like(margin)) / len(margin))


def prompt_interval(values: np.ndarray, prompts: Sequence[str], seed: int, resamples: int = 4000) -> tuple[float, float] | None:
    """95 % interval of the mean of values between 0 and 1, resampling prompts; None for fewer than `resampling.FEWEST_PROMPTS`.

    Pairs of one prompt share pictures and stand or fall together, so it is never their number that makes an interval narrow.
    """
    names = sorted(set(prompts))
    sums = np.array([values[[name == prompt for prompt in prompts]].sum() for name in names])
    counts = np.array([sum(name == prompt for prompt in prompts) for name in names])
    if len(names) >= FEWEST_PROMPTS and are_alike(sums / counts):
        return interval_of_alike(float(values.mean()), len(names), 0.0, 1.0)
    order = np.random.default_rng(seed)
    drawn = order.integers(0, len(names), (resamples, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return interval(means, len(names))


def calibration_error(margin: np.ndarray) -> float:
    """Expected calibration error over ten bins of the stated probability that the preferred one wins, made symmetric."""
    stated = 1 / (1 + np.exp(-np.abs(margin)))
    right = margin > 0
    bins = np.clip(((stated - 0.5) * 20).astype(int), 0, 9)
    return float(sum(abs(stated[bins == number].mean() - right[bins == number].mean()) * (bins == number).mean() for number in range(10) if (bins == number).any()))
