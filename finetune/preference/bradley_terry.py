"""Bradley-Terry: strengths from who won against whom, with intervals. P(a beats b) = sigmoid(strength_a - strength_b)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.preference.pairs import Pair

PRIOR_STD = 2.0
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Standing:
    """One item's place. strength: log-odds against the average item; low, high: its 95 % interval; comparisons: how often seen."""

    item: str
    strength: float
    low: float
    high: float
    wins: float
    comparisons: int


@dataclass(frozen=True)
class Posterior:
    """Gaussian belief about the strengths: mean (n,), covariance (n, n), in the order of `items`."""

    items: tuple[str, ...]
    mean: np.ndarray
    covariance: np.ndarray


def posterior(items: Sequence[str], pairs: Iterable[Pair], prior_mean: np.ndarray | None = None) -> Posterior:
    """Laplace approximation around the most probable strengths under a N(prior_mean, PRIOR_STD^2) prior.

    Newton's method on the concave log posterior (Hunter 2004 gives the likelihood); ties count half a win each way.
    The prior keeps an unbeaten item finite and an unconnected one uncertain.
    """
    index = {item: place for place, item in enumerate(items)}
    known = [pair for pair in pairs if pair.better in index and pair.worse in index]
    better = np.array([index[pair.better] for pair in known], dtype=int)
    worse = np.array([index[pair.worse] for pair in known], dtype=int)
    weight = np.array([pair.weight for pair in known], dtype=float)
    target = np.array([pair.probability for pair in known], dtype=float)
    prior = np.zeros(len(items)) if prior_mean is None else np.asarray(prior_mean, dtype=float)
    strength = prior.copy()
    for _ in range(100):
        expected = _sigmoid(strength[better] - strength[worse])
        gradient = -(strength - prior) / PRIOR_STD**2
        np.add.at(gradient, better, weight * (target - expected))
        np.add.at(gradient, worse, -weight * (target - expected))
        precision = _precision(len(items), better, worse, weight * expected * (1 - expected))
        step = np.linalg.solve(precision, gradient)
        strength = strength + np.clip(step, -2.0, 2.0)
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    expected = _sigmoid(strength[better] - strength[worse])
    return Posterior(tuple(items), strength, np.linalg.inv(_precision(len(items), better, worse, weight * expected * (1 - expected))))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -40, 40)))


def _precision(count: int, better: np.ndarray, worse: np.ndarray, information: np.ndarray) -> np.ndarray:
    matrix = np.eye(count) / PRIOR_STD**2
    np.add.at(matrix, (better, better), information)
    np.add.at(matrix, (worse, worse), information)
    np.add.at(matrix, (better, worse), -information)
    np.add.at(matrix, (worse, better), -information)
    return matrix


def rank_items(items: Sequence[str], pairs: Iterable[Pair]) -> list[Standing]:
    """Items from strongest to weakest, strengths relative to their average, which removes the free offset."""
    pairs = list(pairs)
    if not items:
        return []
    belief = posterior(items, pairs)
    centring = np.eye(len(items)) - 1 / len(items)
    mean, spread = centring @ belief.mean, np.sqrt(np.diag(centring @ belief.covariance @ centring.T).clip(0))
    wins, seen = dict.fromkeys(items, 0.0), dict.fromkeys(items, 0)
    for pair in pairs:
        for item, share in ((pair.better, pair.probability), (pair.worse, 1 - pair.probability)):
            if item in seen:
                wins[item] += share
                seen[item] += 1
    standings = [
        Standing(item, float(m), float(m - NORMAL_95 * s), float(m + NORMAL_95 * s), wins[item], seen[item])
        for item, m, s in zip(items, mean, spread, strict=True)
    ]
    return sorted(standings, key=lambda standing: (-standing.strength, standing.item))


def rank_players(pairs: Iterable[Pair], player_of: Mapping[str, str]) -> list[Standing]:
    """Rank what stands behind the pictures (adapters, settings): every comparison between two players' pictures is a game."""
    games = [
        Pair(player_of[pair.better], player_of[pair.worse], pair.prompt_id, pair.prompt, pair.rater, pair.weight, pair.probability)
        for pair in pairs if player_of[pair.better] != player_of[pair.worse]
    ]
    return rank_items(sorted(set(player_of.values())), games)
