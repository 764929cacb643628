"""From judgements to pairs "this one rather than that one", the only thing that reward models and DPO learn from."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from finetune.preference.comparisons import Judgement

SCORE_GAP = 1.0


@dataclass(frozen=True)
class Pair:
    """`better` was preferred to `worse` by `rater`. probability: 1 for a choice, 0.5 for a tie (order then means nothing).

    weight: a judgement's pairs share its weight, so that a ranking of n counts like the n - 1 choices it holds and not
    like its n (n - 1) / 2 pairs.
    """

    better: str
    worse: str
    prompt_id: str
    prompt: str
    rater: str
    weight: float = 1.0
    probability: float = 1.0


def preference_pairs(judgements: Iterable[Judgement], *, ties: bool = False) -> list[Pair]:
    """Every pair that the judgements hold, oldest first; ties only where asked for. Repeats are left out: they measure
    the annotator and would count the same opinion twice."""
    judgements = [judgement for judgement in judgements if not judgement.repeat]
    pairs = [pair for judgement in judgements for pair in PAIRS_BY_MODE.get(judgement.mode, _no_pairs)(judgement)]
    pairs += _pairs_from_scores([judgement for judgement in judgements if judgement.mode == "score"])
    return pairs if ties else [pair for pair in pairs if pair.probability == 1.0]


def _no_pairs(judgement: Judgement) -> list[Pair]:
    return []


def _from_pair(judgement: Judgement) -> list[Pair]:
    first, second = judgement.items
    if judgement.tie:
        return [_pair(judgement, first, second, probability=0.5)]
    return [_pair(judgement, judgement.choice, second if judgement.choice == first else first)]


def _from_ranking(judgement: Judgement) -> list[Pair]:
    if judgement.ranking is None:
        return []
    weight = 2 / len(judgement.items)
    pairs = []
    for (item, rank), (other, other_rank) in itertools.combinations(zip(judgement.items, judgement.ranking, strict=True), 2):
        better, worse = (item, other) if rank <= other_rank else (other, item)
        pairs.append(_pair(judgement, better, worse, weight=weight, probability=0.5 if rank == other_rank else 1.0))
    return pairs


PAIRS_BY_MODE: dict[str, Callable[[Judgement], list[Pair]]] = {"pair": _from_pair, "rank": _from_ranking}


def _pair(judgement: Judgement, better: str, worse: str, *, weight: float = 1.0, probability: float = 1.0) -> Pair:
    return Pair(better, worse, judgement.prompt_id, judgement.prompt, judgement.rater, weight, probability)


def _pairs_from_scores(judgements: Sequence[Judgement]) -> list[Pair]:
    """Pairs of one annotator's scores within a prompt that differ by SCORE_GAP points or more.

    Each annotator's points are first brought to the mean and spread of all annotators: one person's 4 is another's 3.
    """
    points = {judgement.id: statistics.fmean(judgement.axes.values()) for judgement in judgements}
    spread = statistics.pstdev(points.values()) if points else 0.0
    by_rater: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        by_rater[judgement.rater].append(judgement)
    pairs = []
    for ratings in by_rater.values():
        own = [points[judgement.id] for judgement in ratings]
        own_spread = statistics.pstdev(own)
        scale = spread / own_spread if own_spread else 0.0
        pairs += _gaps(ratings, {judgement.id: points[judgement.id] * scale for judgement in ratings})
    return pairs


def _gaps(ratings: Sequence[Judgement], points: dict[str, float]) -> list[Pair]:
    by_prompt: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in ratings:
        by_prompt[judgement.prompt_id].append(judgement)
    pairs = []
    for group in by_prompt.values():
        weight = 2 / len(group)
        for one, other in itertools.combinations(group, 2):
            gap = points[one.id] - points[other.id]
            if one.items == other.items or abs(gap) < SCORE_GAP - 1e-9:
                continue
            better, worse = (one, other) if gap > 0 else (other, one)
            pairs.append(_pair(one, better.items[0], worse.items[0], weight=weight))
    return pairs
