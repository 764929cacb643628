"""Which training sizes suit a folder: the at most N buckets that keep the most of its pictures.

Buckets are points on a line by the log of their ratio, each with its worth, and the best N of all there are is found
exactly by dynamic programming (the facility location problem on a line); a search goes on from there where small pictures
may not be enlarged. Sizes are (height, width).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.buckets import LARGEST_RATIO, SMALLER_COST, Bucket, Size, candidates, losses, worth

ENOUGH = 5e-4  # fewer buckets are taken when that costs less than this share of the pixels
MOST_ON_LINE = 4000  # sizes that are looked at for the line; a finer grid has more, nearly all alike
MOST_OWN_SIZES = 400  # sizes of small pictures that become candidates themselves
MOST_SIZES_SEARCHED = 3000  # distinct sizes beyond which sizes are rounded before the search without upscaling
SEARCH_SMALLER_COST = 0.1  # instead of SMALLER_COST while small pictures are given sizes of their own, where it is a real choice


def choose_buckets(sizes: Sequence[Size], *, resolution: int, multiple: int, most: int, upscale: bool = False, longest: int | None = None) -> list[Bucket]:
    """The at most `most` buckets that together keep the most of pictures of these (height, width) sizes, by `losses`.

    resolution: side of the square whose area is the budget, pixels.  multiple: what every side must divide by.  longest: as in `candidates`.
    Exact when every picture fills the budget (always with `upscale`); else see `choose_with_bound`.
    """
    return choose_with_bound(sizes, resolution=resolution, multiple=multiple, most=most, upscale=upscale, longest=longest)[0]


def choose_with_bound(sizes: Sequence[Size], *, resolution: int, multiple: int, most: int, upscale: bool = False,
                      longest: int | None = None) -> tuple[list[Bucket], bool]:
    """`choose_buckets`, and whether the result is proven to be the best of all sets of that many sizes, none longer than 4:1.

    The line's optimum ignores that small pictures must not be enlarged. Where all fill the budget and it enlarges none, nothing
    can be better; else smaller buckets join the candidates and a deterministic swap search goes on from there.
    """
    if most < 1 or not len(sizes):
        raise ValueError("choosing buckets needs at least one picture and room for one bucket")
    counted = Counter((int(h), int(w)) for h, w in sizes)
    line = _line(resolution, multiple, longest)
    on_line = _best_on_line(counted, line, most)
    distinct, weights = _rounded(counted)
    fills = min(h * w for h, w in counted) >= line.budget
    if upscale or (fills and losses(distinct, on_line, budget=line.budget, upscale=False).min(1).max() < 1.0):
        return on_line, line.whole
    every = candidates(resolution, multiple, small=_most_frequent(counted, MOST_OWN_SIZES), longest=longest)
    return _swap_search(distinct, weights, sorted({*every, *on_line}), on_line, line.budget, most), False


@dataclass(frozen=True)
class _Line:
    """buckets, by ratio w/h: none is as good as another for every picture.  budget: pixels of the largest.
    positions, log_worth: log of the ratio and of the worth, float64 [buckets].  whole: proven that no size is missing."""

    buckets: list[Bucket]
    budget: int
    positions: np.ndarray
    log_worth: np.ndarray
    whole: bool


def _line(resolution: int, multiple: int, longest: int | None) -> _Line:
    """All sizes that are the best for some ratio; of a fine grid, for each long side only the larger ones."""
    if resolution < multiple:
        raise ValueError(f"a resolution of {resolution} is under the multiple of {multiple}")
    area = resolution * resolution
    longs = range(multiple, min(int(math.sqrt(area * LARGEST_RATIO)), longest or area) + 1, multiple)
    stride = math.ceil(4 * len(longs) / MOST_ON_LINE)
    longs = longs[::-stride]
    room = MOST_ON_LINE // (2 * len(longs))
    square = resolution // multiple * multiple
    found, cut = {Bucket(square, square)}, 0
    for long in longs:
        largest, least = min(long, area // long // multiple * multiple), math.ceil(long / LARGEST_RATIO / multiple) * multiple
        shorts = range(largest, max(least, multiple) - 1, -multiple)
        found |= {Bucket(*sides) for short in shorts[:room] for sides in ((short, long), (long, short))}
        cut = max(cut, long * shorts[room] if len(shorts) > room else 0)
    buckets = sorted(found, key=lambda b: (b.width / b.height, -b.height * b.width))
    areas = np.array([b.height * b.width for b in buckets], dtype=np.float64)
    log_worth, positions = np.log(worth(areas / areas.max(), SMALLER_COST)), np.array([math.log(b.width / b.height) for b in buckets])
    rising, falling = log_worth + positions, log_worth - positions
    of_before = np.concatenate([[-np.inf], np.maximum.accumulate(rising)[:-1]])
    of_after = np.concatenate([np.maximum.accumulate(falling[::-1])[::-1][1:], [-np.inf]])
    best = np.flatnonzero((rising > of_before) & (falling > of_after))
    positions, log_worth = positions[best], log_worth[best]
    # What was cut off is as good as nothing that is here, if even between two of these more is kept than it is worth.
    between = (log_worth[1:] + log_worth[:-1] - np.diff(positions)) / 2
    ends = log_worth[[0, -1]] - (math.log(LARGEST_RATIO) - np.abs(positions[[0, -1]]))
    enough = float(worth(np.array(cut / areas.max()), SMALLER_COST))
    whole = stride == 1 and (not cut or math.exp(min(*between, *ends)) >= enough)
    return _Line([buckets[i] for i in best], int(areas.max()), positions, log_worth, whole)


def _best_on_line(counted: Counter, line: _Line, most: int) -> list[Bucket]:
    """Exact choice by ratio and worth: the smallest number of buckets that is within `ENOUGH` of what `most` reach."""
    points = np.sort(np.array([math.log(w / h) for h, w in counted]))
    order = np.argsort([math.log(w / h) for h, w in counted], kind="stable")
    weights = np.array(list(counted.values()), dtype=np.float64)[order]
    chosen_by_count, totals = _facilities(points, weights, line.positions, line.log_worth, min(most, len(line.buckets)))
    best = min(totals)
    count = next(k for k, total in enumerate(totals) if total <= best + ENOUGH * weights.sum())
    return sorted(line.buckets[i] for i in chosen_by_count[count])


def _facilities(points: np.ndarray, weights: np.ndarray, positions: np.ndarray, log_worth: np.ndarray, most: int) -> tuple[list[list[int]], list[float]]:
    """For k = 1..most: the k positions (sorted) of least total weighted 1 - worth * exp(-distance), and that total."""
    below = np.concatenate([[0.0], np.cumsum(weights)])
    up = np.concatenate([[0.0], np.cumsum(weights * np.exp(points))])
    down = np.concatenate([[0.0], np.cumsum(weights * np.exp(-points))])
    falling, rising = np.exp(log_worth - positions), np.exp(log_worth + positions)

    def left_of(i: int, edge: np.ndarray) -> np.ndarray:  # cost at position i of the points from `edge` up to it
        end = np.searchsorted(points, positions[i])
        edge = np.minimum(edge, end)
        return below[end] - below[edge] - falling[i] * (up[end] - up[edge])

    def right_of(edge: np.ndarray, these: slice) -> np.ndarray:  # cost of the points from each of these positions up to `edge`
        start = np.searchsorted(points, positions[these])
        edge = np.maximum(edge, start)
        return below[edge] - below[start] - rising[these] * (down[edge] - down[start])

    count, everything = len(positions), len(points)
    between = np.full((count, count), np.inf)
    for j in range(1, count):  # points between positions i < j each go to the one that keeps more
        middle = np.searchsorted(points, (positions[:j] + log_worth[:j] + positions[j] - log_worth[j]) / 2)
        between[:j, j] = right_of(middle, slice(j)) + left_of(j, middle)
    cost = np.array([float(left_of(i, np.array(0))) for i in range(count)])
    tail = right_of(np.full(count, everything), slice(count))
    back: list[np.ndarray] = []
    chosen, totals = [], []
    for _ in range(most):
        last = int(np.argmin(cost + tail))
        totals.append(float((cost + tail)[last]))
        path = [last]
        for step in reversed(back):
            path.append(int(step[path[-1]]))
        chosen.append(path[::-1])
        through = cost[:, None] + between
        back.append(np.argmin(through, axis=0))
        cost = through.min(axis=0)
    return chosen, totals


def _most_frequent(counted: Counter, most: int) -> list[Size]:
    return [size for size, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:most]]


def _rounded(counted: Counter) -> tuple[list[Size], np.ndarray]:
    """The distinct sizes and how often each occurs; rounded down to coarser steps when there are too many to search."""
    step = 1
    grouped = dict(counted)
    while len(grouped) > MOST_SIZES_SEARCHED:
        step *= 2
        grouped = {}
        for (h, w), times in counted.items():
            key = max(1, h // step * step), max(1, w // step * step)
            grouped[key] = grouped.get(key, 0) + times
    distinct = sorted(grouped)
    return distinct, np.array([grouped[size] for size in distinct], dtype=np.float64)


def _swap_search(sizes: list[Size], weights: np.ndarray, every: list[Bucket], start: list[Bucket], budget: int, most: int) -> list[Bucket]:
    """Add the bucket that helps most until `most`, then swap one for another while that helps. No randomness."""
    cost = losses(sizes, every, budget=budget, upscale=False, smaller_cost=SEARCH_SMALLER_COST) * weights[:, None]
    index = {bucket: i for i, bucket in enumerate(every)}
    worth = ENOUGH * weights.sum()
    chosen: list[int] = []
    current = np.full(len(sizes), np.inf)
    while len(chosen) < most:
        totals = np.minimum(cost, current[:, None]).sum(0)
        best = int(np.argmin(totals))
        if chosen and current.sum() - totals[best] <= worth:
            break
        chosen.append(best)
        current = np.minimum(current, cost[:, best])
    seeds = [chosen, [index[b] for b in start if b in index][:most]]
    chosen = min((_swapped(cost, seed) for seed in seeds if seed), key=lambda c: cost[:, c].min(1).sum())
    used = np.unique(np.asarray(chosen)[np.argmin(cost[:, chosen], axis=1)])
    return [every[i] for i in used]


def _swapped(cost: np.ndarray, chosen: list[int]) -> list[int]:
    chosen = list(chosen)
    total = cost[:, chosen].min(1).sum()
    improved = True
    while improved:
        improved = False
        for slot in range(len(chosen)):
            others = chosen[:slot] + chosen[slot + 1 :]
            rest = cost[:, others].min(1) if others else np.full(len(cost), np.inf)
            totals = np.minimum(cost, rest[:, None]).sum(0)
            best = int(np.argmin(totals))
            if totals[best] < total - 1e-9:
                chosen[slot], total, improved = best, totals[best], True
    return chosen
