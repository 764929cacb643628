"""How far judgements can be trusted: agreement between annotators, with themselves, with logic, and with the screen side."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.preference.bradley_terry import NORMAL_95
from finetune.preference.comparisons import Judgement
from finetune.preference.pairs import Pair, preference_pairs

Ratings = Mapping[Hashable, Mapping[str, float]]
TIE = 2.0


def krippendorff_alpha(ratings: Ratings, level: str = "nominal") -> float | None:
    """Agreement beyond chance: 1 perfect, 0 chance, below 0 opposed. None where nothing can be compared.

    ratings: unit -> {annotator: value}; any number of annotators, any of them missing anywhere.
    level: nominal (choices), ordinal (ranks), interval (points). Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability", sections C to E.
    """
    units = [list(values.values()) for values in ratings.values() if len(values) > 1]
    values = sorted({value for unit in units for value in unit})
    if not values:
        return None
    place = {value: index for index, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for unit in units:
        for one, other in itertools.permutations(unit, 2):
            coincidences[place[one], place[other]] += 1 / (len(unit) - 1)
    totals = coincidences.sum(axis=1)
    distance = DISTANCES[level](np.array(values, dtype=float), totals)
    expected = (np.outer(totals, totals) * distance).sum()
    if expected == 0:
        return 1.0
    return float(1 - (totals.sum() - 1) * (coincidences * distance).sum() / expected)


def _nominal(values: np.ndarray, totals: np.ndarray) -> np.ndarray:
    return (values[:, None] != values[None, :]).astype(float)


def _interval(values: np.ndarray, totals: np.ndarray) -> np.ndarray:
    return (values[:, None] - values[None, :]) ** 2


def _ordinal(values: np.ndarray, totals: np.ndarray) -> np.ndarray:
    middle = np.cumsum(totals) - totals / 2
    return (middle[:, None] - middle[None, :]) ** 2


DISTANCES = {"nominal": _nominal, "ordinal": _ordinal, "interval": _interval}


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); (0, 1) without trials."""
    if trials <= 0:
        return 0.0, 1.0
    share, z = successes / trials, NORMAL_95
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Share:
    """A share of `trials` with its 95 % interval; value None where there was nothing to count."""

    value: float | None
    low: float
    high: float
    trials: int


def share_of(flags: Iterable[bool]) -> Share:
    """Count true ones."""
    flags = list(flags)
    low, high = wilson_interval(sum(flags), len(flags))
    return Share(sum(flags) / len(flags) if flags else None, low, high, len(flags))


@dataclass(frozen=True)
class Trust:
    """What the judgements say about themselves.

    alpha: Krippendorff's alpha by what was asked ("pair", "rank", "score:<criterion>"); None without an overlap.
    pair_agreement: share of pairs that two annotators answered alike.  ceiling: the accuracy that a perfect reward model
    could reach against one annotator's choices, from the pairs that both decided, since ties count in no accuracy; None
    without an overlap.
    left: share of choices for the left picture (45 to 55 % is healthy).  consistency: share of repeats answered alike.
    triads, cyclic: triples of pictures that were fully compared, and those with a circle a > b > c > a.
    seconds: median time an answer by annotator.
    """

    judgements: int
    by_annotator: Mapping[str, int]
    alpha: Mapping[str, float | None]
    pair_agreement: Share
    ceiling: float | None
    left: Share
    consistency: Share
    triads: int
    cyclic: int
    seconds: Mapping[str, float]


def trust(judgements: Sequence[Judgement]) -> Trust:
    """All the figures above."""
    first = [judgement for judgement in judgements if not judgement.repeat]
    ratings = _ratings(first)
    answers = [two for unit in ratings.get("pair", {}).values() for two in itertools.combinations(unit.values(), 2)]
    decided = share_of(one == other for one, other in answers if TIE not in (one, other))
    by_annotator: dict[str, list[int]] = defaultdict(list)
    for judgement in judgements:
        by_annotator[judgement.rater].append(judgement.ms or 0)
    triads, cyclic = transitivity(preference_pairs(first))
    return Trust(
        judgements=len(judgements), by_annotator={rater: len(times) for rater, times in by_annotator.items()},
        alpha={name: krippendorff_alpha(values, "nominal" if name == "pair" else "ordinal") for name, values in ratings.items()},
        pair_agreement=share_of(one == other for one, other in answers), ceiling=_ceiling(decided.value),
        left=share_of(judgement.choice == judgement.shown[0] for judgement in judgements if judgement.mode == "pair" and judgement.choice),
        consistency=_consistency(judgements), triads=triads, cyclic=cyclic,
        seconds={rater: statistics.median(times) / 1000 for rater, times in by_annotator.items()},
    )


def _choice(judgement: Judgement) -> float:
    """A pair's answer relative to the sorted ids, whatever the order on the screen: 0 or 1, or `TIE`."""
    return TIE if judgement.tie else float(sorted(judgement.items).index(judgement.choice))


def _ratings(judgements: Iterable[Judgement]) -> dict[str, dict[Hashable, dict[str, float]]]:
    ratings: dict[str, dict[Hashable, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for judgement in judgements:
        if judgement.mode == "pair":
            ratings["pair"][tuple(sorted(judgement.items))][judgement.rater] = _choice(judgement)
        for item, rank in zip(judgement.items, judgement.ranking or (), strict=False):
            ratings["rank"][(frozenset(judgement.items), item)][judgement.rater] = float(rank)
        for criterion, points in (judgement.axes or {}).items():
            ratings[f"score:{criterion}"][judgement.items][judgement.rater] = float(points)
    return ratings


def _ceiling(agreement: float | None) -> float | None:
    """If every annotator is right with chance p, two agree with p^2 + (1 - p)^2; solved for p."""
    if agreement is None:
        return None
    return (1 + math.sqrt(max(0.0, 2 * agreement - 1))) / 2


def _consistency(judgements: Iterable[Judgement]) -> Share:
    answers: dict[tuple, Judgement] = {}
    alike = []
    for judgement in judgements:
        key = (judgement.rater, tuple(sorted(judgement.items)))
        if judgement.mode == "pair" and judgement.repeat and key in answers:
            alike.append(_choice(judgement) == _choice(answers[key]))
        elif judgement.mode == "pair" and not judgement.repeat:
            answers[key] = judgement
    return share_of(alike)


def transitivity(pairs: Iterable[Pair]) -> tuple[int, int]:
    """(triples of pictures with all three comparisons decided by majority, those of them that are circular)."""
    balance: dict[tuple[str, str], float] = defaultdict(float)
    for pair in pairs:
        first, second = sorted((pair.better, pair.worse))
        balance[first, second] += 1.0 if pair.better == first else -1.0
    beats: defaultdict[str, set[str]] = defaultdict(set)
    met: dict[str, set[str]] = defaultdict(set)
    for (first, second), margin in balance.items():
        if margin:
            winner, loser = (first, second) if margin > 0 else (second, first)
            beats[winner].add(loser)
            beats.setdefault(loser, set())
            met[first].add(second)
            met[second].add(first)
    triads = sum(1 for one in met for two in met[one] if two > one for three in met[one] & met[two] if three > two)
    cyclic = sum(1 for one in beats for two in beats[one] for three in beats[two] if one in beats[three]) // 3
    return triads, cyclic
