"""Training sizes: which there are for a resolution, how a picture is fitted to one, and what it loses there.

Sizes are (height, width) everywhere. For a picture of ratio w/h = e^x in a bucket of ratio W/H = e^c, covering and
cropping keeps exp(-|x - c|) of it, and a bucket with fewer pixels than there might be is worth less by some share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]

LARGEST_RATIO = 4.0  # candidates are at most four times as long as wide; longer pictures lose the rest
LEAST_AREA = 0.9  # share of the pixel budget from which a bucket counts as of full size
SMALLER_COST = 0.01  # what a share of unused pixels costs beside the same share cropped away: it only decides near ties


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

    Crop: exp(-|x - c|) is kept. Detail: a bucket much smaller than what the picture could fill (its own area or `budget`,
    whichever is less) is worth less by the difference; of two that are large enough the larger is a little better. Without `upscale`, a bucket the picture cannot cover costs 1 + its border.
    """
    size = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    bucket = np.asarray([(b.height, b.width) for b in buckets], dtype=np.float64)
    area = size.prod(1)[:, None]
    x, c = np.log(size[:, 1] / size[:, 0])[:, None], np.log(bucket[:, 1] / bucket[:, 0])[None, :]
    kept = np.exp(-np.abs(x - c))
    could_fill = np.full_like(area, budget) if upscale else np.minimum(area, budget)
    cost = 1.0 - kept * worth(bucket.prod(1)[None, :] / could_fill, smaller_cost)
    if upscale:
        return cost
    rows = np.minimum(size[:, :1], bucket[None, :, 0])
    columns = np.minimum(size[:, 1:], bucket[None, :, 1])
    too_small = (size[:, :1] < bucket[None, :, 0]) | (size[:, 1:] < bucket[None, :, 1])
    return np.where(too_small, 2.0 - rows * columns / bucket.prod(1)[None, :], cost)


def worth(share: np.ndarray, smaller_cost: float) -> np.ndarray:
    """What a bucket is worth beside one of full size. share: of the pixels that a picture could fill."""
    return np.minimum(1.0, share / LEAST_AREA) * (1.0 - smaller_cost * (1.0 - np.minimum(1.0, share)))


def candidates(resolution: int, multiple: int, *, small: Sequence[Size] = (), longest: int | None = None) -> list[Bucket]:
    """Sizes with sides in `multiple` and about resolution x resolution pixels, ratio at most 4: one for each long side.

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
