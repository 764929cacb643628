"""What each picture loses in which bucket, beside what the usual fixed lists would cost the same folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.bucket_choice import choose_with_bound
from data_tools.buckets import Bucket, Placement, assign
from data_tools.records import ImageRecord

# The ratios of the bucket list in diffusers' training examples.
ELEVEN_RATIOS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))
MUCH_LOST = 0.2  # share of a picture's area worth a word


@dataclass(frozen=True)
class BucketRow:
    """One bucket and its pictures. lost: mean share of a picture that falls off, 0..1.  lost_pixels: sum over its pictures."""

    bucket: Bucket
    pictures: int
    lost_pixels: int
    lost: float
    worst: ImageRecord
    worst_lost: float
    padded: int


@dataclass(frozen=True)
class ListCost:
    """What a list of buckets costs a folder. used: buckets that get a picture.  mean, high: mean and 95th percentile of the lost share.
    padded: pictures that get a border because they are too small for every bucket.  size: mean share of resolution x resolution pixels
    that a picture's bucket has; a list of smaller sizes may lose less and show less."""

    name: str
    buckets: int
    used: int
    mean: float
    high: float
    padded: int
    size: float


@dataclass(frozen=True)
class BucketReport:
    """placements: one for each record, in order.  optimal: proven to be the best set of this many."""

    rows: tuple[BucketRow, ...]
    placements: tuple[Placement, ...]
    optimal: bool
    compared: tuple[ListCost, ...]
    resolution: int
    multiple: int

    @property
    def lost(self) -> float:
        """Mean share of a picture that falls off."""
        return self.compared[0].mean


def lost_share(placement: Placement, record: ImageRecord) -> float:
    """Share of the picture's area that falls off, 0..1."""
    return placement.lost_pixels / (record.width * record.height)


def report_buckets(
    records: Sequence[ImageRecord], *, resolution: int, multiple: int, most: int, upscale: bool = False, fit: str = "crop", batch_size: int = 1,
    longest: int | None = None
) -> BucketReport:
    """Choose buckets for these pictures and account for every one of them.

    resolution, multiple: of the model family, pixels.  longest: side that no bucket may exceed.  most: buckets at most; with a batch size B also at most pictures / 2B
    (but three), because a bucket with fewer pictures than a batch gives small batches. No picture is ever dropped for that.
    """
    sizes = [record.size for record in records]
    room = max(3, len(records) // (2 * batch_size)) if batch_size > 1 else most
    buckets, optimal = choose_with_bound(sizes, resolution=resolution, multiple=multiple, most=min(most, room), upscale=upscale, longest=longest)
    placements = [assign(size, buckets, upscale=upscale, fit=fit) for size in sizes]
    rows = []
    for bucket in sorted({p.bucket for p in placements}, key=lambda b: b.width / b.height):
        inside = [(record, p) for record, p in zip(records, placements, strict=True) if p.bucket == bucket]
        shares = [lost_share(p, record) for record, p in inside]
        worst = max(range(len(inside)), key=shares.__getitem__)
        rows.append(BucketRow(bucket, len(inside), sum(p.lost_pixels for _, p in inside), sum(shares) / len(shares), inside[worst][0], shares[worst], sum(p.padded for _, p in inside)))
    compared = [_cost("this folder's own", buckets, records, placements, resolution)]
    for name, fixed in fixed_lists(resolution, multiple).items():
        compared.append(_cost(name, fixed, records, [assign(size, fixed, upscale=upscale, fit=fit) for size in sizes], resolution))
    return BucketReport(tuple(rows), tuple(placements), optimal, tuple(compared), resolution, multiple)


def _cost(name: str, buckets: Sequence[Bucket], records: Sequence[ImageRecord], placements: Sequence[Placement], resolution: int) -> ListCost:
    shares = sorted(lost_share(p, record) for p, record in zip(placements, records, strict=True))
    high = shares[min(len(shares) - 1, math.ceil(0.95 * len(shares)) - 1)]
    size = sum(p.bucket.height * p.bucket.width for p in placements) / len(placements) / resolution**2
    return ListCost(name, len(buckets), len({p.bucket for p in placements}), sum(shares) / len(shares), high, sum(p.padded for p in placements), size)


def fixed_lists(resolution: int, multiple: int) -> dict[str, list[Bucket]]:
    """Lists that trainers use for every folder, by name."""
    step = max(multiple, min(64, resolution // 4 // multiple * multiple))
    area = resolution * resolution
    stepped = {Bucket(resolution // step * step, resolution // step * step)}
    for width in range(max(step, resolution // 4 // step * step), resolution * 2 + 1, step):
        height = min(resolution * 2, area // width // step * step)
        if height:
            stepped |= {Bucket(height, width), Bucket(width, height)}
    ratios = {_rounded(resolution, w / h, multiple) for w, h in ELEVEN_RATIOS}
    return {f"fixed steps of {step}": sorted(stepped), "eleven ratios": sorted(ratios), "one square": [_rounded(resolution, 1.0, multiple)]}


def _rounded(resolution: int, ratio: float, multiple: int) -> Bucket:
    width, height = resolution * math.sqrt(ratio), resolution / math.sqrt(ratio)
    return Bucket(max(1, int(height // multiple)) * multiple, max(1, int(width // multiple)) * multiple)


def table(report: BucketReport) -> list[str]:
    """Lines for a terminal: one a bucket, then the comparison."""
    lines = [f"{'bucket':>11}  {'pictures':>8}  {'lost':>6}  {'worst':>6}  worst picture"]
    for row in report.rows:
        border = f"  ({row.padded} with a border: too small to fill it)" if row.padded else ""
        lines.append(f"{row.bucket!s:>11}  {row.pictures:>8}  {row.lost:>6.1%}  {row.worst_lost:>6.1%}  {row.worst.path.name}{border}")
    lines += ["", f"{'list':<20} {'buckets':>7} {'used':>5} {'mean lost':>10} {'95 % lose at most':>18} {'with border':>12} {'mean size':>10}"]
    lines += [f"{c.name:<20} {c.buckets:>7} {c.used:>5} {c.mean:>10.2%} {c.high:>18.2%} {c.padded:>12} {c.size:>10.0%}" for c in report.compared]
    lines.append("no other set of this many sizes, none longer than 4:1, keeps more: what is cropped counts, and sizes of under 90 % of the pixels"
                 if report.optimal else "found by search: another set of this many sizes may keep a little more")
    return lines
