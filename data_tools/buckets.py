"""Training sizes for one folder: the set of at most N buckets that loses the fewest pixels, and how a picture is fitted.

Sizes are (height, width) everywhere. For a picture of ratio w/h = e^x in a bucket of ratio W/H = e^c, covering and
cropping keeps exp(-|x - c|) of it. So buckets of one area are points on a line, and the best N of a finite list of
candidates is found exactly by dynamic programming (the facility location problem on a line).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]

LARGEST_RATIO = 4.0  # candidates are at most four times as long as wide; longer pictures lose the rest
LEAST_AREA = 0.9  # share of the pixel budget that a full-size candidate must use
SMALLER_COST = 0.01  # what a share of unused pixels costs beside the same share cropped away: it only decides near ties
SEARCH_SMALLER_COST = 0.1  # the same while small pictures are given sizes of their own, where it is a real choice
ENOUGH = 5e-4  # fewer buckets are taken when that costs less than this share of the pixels
MOST_OWN_SIZES = 400  # sizes of small pictures that become candidates themselves
MOST_SIZES_SEARCHED = 3000  # distinct sizes beyond which sizes are rounded before the search without upscaling


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One training size in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class Placement:
    """How one picture is fitted to its bucket.

    resized: (height, width) before cropping.  crop: (top, left) of the bucket in the resized picture; negative where the
    picture is smaller than the bucket and gets a border.  lost_pixels: pixels of the source that fall off.
    """

    bucket: Bucket
    resized: Size
    crop: Size
    lost_pixels: int

    @property
    def padded(self) -> bool:
        """Whether the bucket shows a border beside the picture."""
        return self.resized[0] < self.bucket.height or self.resized[1] < self.bucket.width


def place(size: Size, bucket: Bucket, *, fit: str = "crop", upscale: bool = False) -> Placement:
    """Fit a picture of `size` into `bucket`, centred. fit: "crop" covers the bucket, "pad" shows the whole picture.

    Without `upscale` a picture that is too small keeps its pixels and gets a border.
    """
    height, width = size
    ratios = bucket.height / height, bucket.width / width
    scale = max(ratios) if fit == "crop" else min(ratios)
    if scale > 1 and not upscale:
        resized = size
    else:
        resized = max(1, round(height * scale)), max(1, round(width * scale))
    rows, columns = min(resized[0], bucket.height), min(resized[1], bucket.width)
    lost = round(height * width * (1 - rows * columns / (resized[0] * resized[1])))
    # floor division puts the odd pixel on the same side for pictures that are cropped and for those that are padded
    return Placement(bucket, resized, ((resized[0] - bucket.height) // 2, (resized[1] - bucket.width) // 2), lost)


def assign(size: Size, buckets: Sequence[Bucket], *, upscale: bool = False, fit: str = "crop") -> Placement:
    """The placement of a picture in the bucket that keeps most of it. Ties go to the smaller height, then width.

    Never None: without a bucket that fits without enlarging, the picture is shown with a border.
    """
    if not buckets:
        raise ValueError("no buckets")
    ordered = sorted(buckets)
    budget = max(b.height * b.width for b in ordered)
    best = int(np.argmin(losses([size], ordered, budget=budget, upscale=upscale)[0]))
    return place(size, ordered[best], fit=fit, upscale=upscale)


def losses(sizes: Sequence[Size], buckets: Sequence[Bucket], *, budget: int, upscale: bool, smaller_cost: float = SMALLER_COST) -> np.ndarray:
    """Cost of each picture in each bucket, float64 [pictures, buckets].

    Crop: 1 - exp(-|x - c|). Detail: a bucket much smaller than what the picture could fill (its own area or `budget`,
    whichever is less) loses the difference; of two that are large enough the larger is a little better. Without `upscale`, a bucket the picture cannot cover costs 1 + its border.
    """
    size = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    bucket = np.asarray([(b.height, b.width) for b in buckets], dtype=np.float64)
    area = size.prod(1)[:, None]
    x, c = np.log(size[:, 1] / size[:, 0])[:, None], np.log(bucket[:, 1] / bucket[:, 0])[None, :]
    kept = np.exp(-np.abs(x - c))
    detail = np.minimum(1.0, bucket.prod(1)[None, :] / (LEAST_AREA * np.minimum(area, budget)))
    if upscale:
        area = np.full_like(area, budget)
        detail = np.minimum(1.0, bucket.prod(1)[None, :] / (LEAST_AREA * area))
    smaller = 1.0 - np.minimum(1.0, bucket.prod(1)[None, :] / np.minimum(area, budget))
    cost = 1.0 - kept * detail + smaller_cost * smaller
    if upscale:
        return cost
    rows = np.minimum(size[:, :1], bucket[None, :, 0])
    columns = np.minimum(size[:, 1:], bucket[None, :, 1])
    too_small = (size[:, :1] < bucket[None, :, 0]) | (size[:, 1:] < bucket[None, :, 1])
    return np.where(too_small, 2.0 - rows * columns / bucket.prod(1)[None, :], cost)


def candidates(resolution: int, multiple: int, *, small: Sequence[Size] = (), longest: int | None = None) -> list[Bucket]:
    """Every size with sides in `multiple` and about resolution x resolution pixels, ratio at most 4.

    longest: side that no size may exceed, at least `resolution`; None for none.
    small: sizes of pictures that must not be enlarged; for them also what each fills itself, and levels of half the area each.
    """
    if resolution < multiple:
        raise ValueError(f"a resolution of {resolution} is under the multiple of {multiple}")
    budget = resolution * resolution
    found = set(_level(budget, multiple))
    if not small:
        return _within(found, longest)
    area, least = budget // 2, max(multiple * multiple, min(h * w for h, w in small) // 2)
    while area >= least:
        found.update(_level(area, multiple))
        area //= 2
    for height, width in small:
        own = Bucket(max(1, height // multiple) * multiple, max(1, width // multiple) * multiple)
        if own.height * own.width <= budget and max(own.height, own.width) <= LARGEST_RATIO * min(own.height, own.width):
            found.add(own)
    return _within(found | {Bucket(multiple, multiple)}, longest)


def _within(found: set[Bucket], longest: int | None) -> list[Bucket]:
    return sorted(bucket for bucket in found if longest is None or max(bucket.height, bucket.width) <= longest)


def _level(area: int, multiple: int) -> list[Bucket]:
    found = set()
    for steps in range(1, int(math.sqrt(area * LARGEST_RATIO)) // multiple + 1):
        long = steps * multiple
        short = area // long // multiple * multiple
        if short and max(long, short) <= LARGEST_RATIO * min(long, short) and long * short >= LEAST_AREA * area:
            found |= {Bucket(short, long), Bucket(long, short)}
    square = int(math.sqrt(area)) // multiple * multiple
    return sorted(found | {Bucket(square, square)})


def choose_buckets(sizes: Sequence[Size], *, resolution: int, multiple: int, most: int, upscale: bool = False, longest: int | None = None) -> list[Bucket]:
    """The at most `most` buckets that together lose the fewest pixels of pictures of these (height, width) sizes.

    resolution: side of the square whose area is the budget, pixels.  multiple: what every side must divide by.  longest: as in `candidates`.
    Exact when every picture covers its bucket (always with `upscale`); else see `choose_with_bound`.
    """
    return choose_with_bound(sizes, resolution=resolution, multiple=multiple, most=most, upscale=upscale, longest=longest)[0]


def choose_with_bound(sizes: Sequence[Size], *, resolution: int, multiple: int, most: int, upscale: bool = False,
                      longest: int | None = None) -> tuple[list[Bucket], bool]:
    """`choose_buckets`, and whether the result is proven to be the optimum over the candidates.

    The line's optimum ignores that small pictures must not be enlarged. Where it enlarges none, nothing can be better;
    else smaller buckets join the candidates and a deterministic swap search goes on from there.
    """
    if most < 1 or not len(sizes):
        raise ValueError("choosing buckets needs at least one picture and room for one bucket")
    counted = Counter((int(h), int(w)) for h, w in sizes)
    full = candidates(resolution, multiple, longest=longest)
    on_line = _best_on_line(counted, full, most)
    budget = max(b.height * b.width for b in full)
    distinct, weights = _rounded(counted)
    if upscale or losses(distinct, on_line, budget=budget, upscale=False).min(1).max() < 1.0:
        return on_line, True
    every = candidates(resolution, multiple, small=_most_frequent(counted, MOST_OWN_SIZES), longest=longest)
    return _swap_search(distinct, weights, every, on_line, budget, most), False


def _best_on_line(counted: Counter, full: list[Bucket], most: int) -> list[Bucket]:
    """Exact choice by ratio alone: the smallest number of buckets that is within `ENOUGH` of what `most` reach."""
    by_ratio: dict[float, Bucket] = {}
    for bucket in full:
        ratio = bucket.width / bucket.height
        if ratio not in by_ratio or bucket.height * bucket.width > by_ratio[ratio].height * by_ratio[ratio].width:
            by_ratio[ratio] = bucket
    line = [by_ratio[ratio] for ratio in sorted(by_ratio)]
    points = np.sort(np.array([math.log(w / h) for h, w in counted]))
    order = np.argsort([math.log(w / h) for h, w in counted], kind="stable")
    weights = np.array(list(counted.values()), dtype=np.float64)[order]
    positions = np.array([math.log(b.width / b.height) for b in line])
    chosen_by_count, totals = _facilities(points, weights, positions, min(most, len(line)))
    best = min(totals)
    count = next(k for k, total in enumerate(totals) if total <= best + ENOUGH * weights.sum())
    return sorted(line[i] for i in chosen_by_count[count])


def _facilities(points: np.ndarray, weights: np.ndarray, positions: np.ndarray, most: int) -> tuple[list[list[int]], list[float]]:
    """For k = 1..most: the k positions (sorted) of least total weighted 1 - exp(-distance), and that total."""
    below = np.concatenate([[0.0], np.cumsum(weights)])
    up = np.concatenate([[0.0], np.cumsum(weights * np.exp(points))])
    down = np.concatenate([[0.0], np.cumsum(weights * np.exp(-points))])

    def left_of(i: int, edge: np.ndarray) -> np.ndarray:  # cost at position i of the points from `edge` up to it
        end = np.searchsorted(points, positions[i])
        edge = np.minimum(edge, end)
        return below[end] - below[edge] - math.exp(-positions[i]) * (up[end] - up[edge])

    def right_of(edge: np.ndarray, start_at: np.ndarray) -> np.ndarray:  # cost of the points from each position up to `edge`
        start = np.searchsorted(points, start_at)
        edge = np.maximum(edge, start)
        return below[edge] - below[start] - np.exp(start_at) * (down[edge] - down[start])

    count, everything = len(positions), len(points)
    between = np.full((count, count), np.inf)
    for j in range(1, count):  # points between positions i < j each go to the nearer one
        middle = np.searchsorted(points, (positions[:j] + positions[j]) / 2)
        between[:j, j] = right_of(middle, positions[:j]) + left_of(j, middle)
    cost = np.array([float(left_of(i, np.array(0))) for i in range(count)])
    tail = right_of(np.full(count, everything), positions)
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
