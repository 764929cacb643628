"""Buckets: the optimum is the optimum, nothing is dropped, nothing is enlarged unless asked, losses are what the pixels say."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.bucket_report import fixed_lists, lost_share, report_buckets, table
from data_tools.bucket_choice import choose_buckets, choose_with_bound
from data_tools.buckets import Bucket, assign, losses, place
from data_tools.records import ImageRecord

SIZE = st.tuples(st.integers(8, 3000), st.integers(8, 3000)).filter(lambda s: max(s) <= 20 * min(s))


def cropped_share(size, bucket):
    """What covering and cropping loses, from the pixels alone."""
    scale = max(bucket.height / size[0], bucket.width / size[1])
    return 1 - bucket.height * bucket.width / (size[0] * size[1] * scale**2)


def every_size(resolution, multiple):
    """All sizes of at most resolution x resolution pixels that are no longer than 4:1."""
    sides = range(multiple, 2 * resolution + 1, multiple)
    return [Bucket(h, w) for h in sides for w in sides if h * w <= resolution**2 and max(h, w) <= 4 * min(h, w)]


def cost(sizes, buckets, resolution, multiple):
    """What these pictures lose in the buckets that suit each best, cropped and unused pixels together."""
    budget = max(b.height * b.width for b in every_size(resolution, multiple))
    return losses(sizes, buckets, budget=budget, upscale=True).min(1).sum()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(600, 3000), st.integers(600, 3000)), min_size=1, max_size=20), st.integers(1, 3), st.sampled_from([(256, 64), (96, 16), (250, 48)]))
def test_the_choice_is_as_good_as_trying_every_set(sizes, most, family):
    resolution, multiple = family
    chosen, proven = choose_with_bound(sizes, resolution=resolution, multiple=multiple, most=most, upscale=True)
    every = every_size(resolution, multiple)
    by_set = losses(sizes, every, budget=max(b.height * b.width for b in every), upscale=True)
    best = min(by_set[:, list(some)].min(1).sum() for some in itertools.combinations(range(len(every)), most))
    assert proven and len(chosen) <= most
    assert cost(sizes, chosen, resolution, multiple) <= best + 5e-4 * len(sizes) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1500, 5000), st.integers(1500, 5000)), min_size=1, max_size=30),
       st.sampled_from([(96, 16), (64, 16), (512, 64), (512, 16), (1024, 16), (1024, 64)]))
def test_no_fixed_list_keeps_more_with_as_many_sizes(sizes, family):
    resolution, multiple = family
    for name, fixed in fixed_lists(resolution, multiple).items():
        used = {assign(size, fixed, upscale=True).bucket for size in sizes}
        chosen, proven = choose_with_bound(sizes, resolution=resolution, multiple=multiple, most=len(used), upscale=True)
        assert proven and cost(sizes, chosen, resolution, multiple) <= cost(sizes, list(used), resolution, multiple) + 5e-4 * len(sizes) + 1e-9, name


def test_a_size_of_fewer_pixels_is_taken_where_it_shows_more():
    report = report_buckets(records([(838, 1024)]), resolution=96, multiple=16, most=8)
    own, *others = report.compared
    assert own.mean < 0.03 and all(own.mean <= other.mean for other in others)
    assert own.size == pytest.approx(80 * 96 / 96**2) and any("83%" in line for line in table(report))


def test_what_is_not_proven_is_not_claimed():
    fine = [(9000, 7000), (6000, 8000)]
    assert choose_with_bound(fine, resolution=4096, multiple=8, most=2, upscale=True)[1] is False
    assert "may keep a little more" in table(report_buckets(records([(60, 90)] * 3), resolution=96, multiple=16, most=2))[-1]


@settings(max_examples=40, deadline=None)
@given(st.lists(SIZE, min_size=1, max_size=30), st.integers(1, 6), st.sampled_from([(256, 16), (64, 16), (512, 32)]), st.sampled_from(["crop", "pad"]))
def test_every_picture_gets_a_place_and_none_is_enlarged(sizes, most, family, fit):
    resolution, multiple = family
    buckets = choose_buckets(sizes, resolution=resolution, multiple=multiple, most=most)
    assert 1 <= len(buckets) <= most
    assert all(b.height % multiple == 0 and b.width % multiple == 0 and b.height * b.width <= resolution**2 for b in buckets)
    for size in sizes:
        placed = assign(size, buckets, fit=fit)
        assert placed.bucket in buckets
        assert placed.resized[0] <= size[0] and placed.resized[1] <= size[1]
        assert fit == "crop" or placed.lost_pixels <= 0.02 * size[0] * size[1]


@settings(max_examples=60, deadline=None)
@given(SIZE, SIZE, st.booleans(), st.sampled_from(["crop", "pad"]))
def test_lost_pixels_are_those_outside_the_crop(size, shape, upscale, fit):
    bucket = Bucket(*(max(8, side // 8 * 8) for side in shape))
    placed = place(size, bucket, fit=fit, upscale=upscale)
    rows, columns = min(placed.resized[0], bucket.height), min(placed.resized[1], bucket.width)
    assert placed.lost_pixels == round(size[0] * size[1] * (1 - rows * columns / (placed.resized[0] * placed.resized[1])))
    if fit == "crop" and (upscale or not placed.padded):
        assert not placed.padded
        assert abs(placed.lost_pixels / (size[0] * size[1]) - max(0.0, cropped_share(size, bucket))) < 0.02 + 2 / min(*bucket_sides(bucket))


def bucket_sides(bucket):
    return bucket.height, bucket.width


def test_more_buckets_never_lose_more():
    draws = random.Random(3)
    sizes = [(draws.randint(700, 2000), draws.randint(700, 2000)) for _ in range(200)]
    lost = [cost(sizes, choose_buckets(sizes, resolution=512, multiple=16, most=most, upscale=True), 512, 16) for most in range(1, 10)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(lost)) and lost[0] > 2 * lost[-1]


def test_the_same_sizes_give_the_same_buckets_in_any_order():
    draws = random.Random(5)
    sizes = [(draws.randint(30, 900), draws.randint(30, 900)) for _ in range(120)]
    shuffled = sizes[:]
    draws.shuffle(shuffled)
    assert choose_buckets(sizes, resolution=256, multiple=16, most=6) == choose_buckets(shuffled, resolution=256, multiple=16, most=6)


def test_a_small_picture_gets_a_bucket_of_its_own_size_instead_of_being_enlarged():
    buckets, optimal = choose_with_bound([(1024, 1024)] * 5 + [(208, 400)] * 5, resolution=1024, multiple=16, most=4)
    assert not optimal and set(buckets) == {Bucket(1024, 1024), Bucket(208, 400)}
    assert choose_with_bound([(2048, 2048)], resolution=1024, multiple=16, most=4) == ([Bucket(1024, 1024)], True)


def records(sizes):
    from pathlib import Path

    return [ImageRecord(Path(f"{i}.png"), w, h, str(i)) for i, (h, w) in enumerate(sizes)]


def test_the_report_accounts_for_every_picture_and_beats_the_fixed_lists():
    draws = random.Random(1)
    ratios = [1.0, 1.5, 2 / 3, 4 / 3, 16 / 9, 0.71]
    sizes = [(round(1800 / math.sqrt(r)), round(1800 * math.sqrt(r))) for r in (draws.choice(ratios) * draws.uniform(0.97, 1.03) for _ in range(150))]
    report = report_buckets(records(sizes), resolution=1024, multiple=16, most=11)
    assert sum(row.pictures for row in report.rows) == 150 and len(report.placements) == 150
    assert sum(row.lost_pixels for row in report.rows) == sum(p.lost_pixels for p in report.placements)
    own, *others = report.compared
    assert {c.name for c in others} == {"fixed steps of 64", "eleven ratios", "one square"}
    assert report.optimal and all(own.mean < c.mean for c in others)
    assert any("fixed steps of 64" in line for line in table(report))


def test_no_picture_is_dropped_because_a_bucket_is_smaller_than_a_batch():
    sizes = [(512, 512)] * 9 + [(300, 900)]
    report = report_buckets(records(sizes), resolution=512, multiple=16, most=8, batch_size=8)
    assert sum(row.pictures for row in report.rows) == 10


def test_padding_shows_the_whole_picture():
    report = report_buckets(records([(400, 1000), (1000, 400), (700, 700)]), resolution=512, multiple=16, most=1, fit="pad")
    assert all(lost_share(p, r) < 0.01 for p, r in zip(report.placements, records([(400, 1000), (1000, 400), (700, 700)]), strict=True))


@pytest.mark.parametrize(("resolution", "multiple"), [(1024, 16), (64, 16), (512, 32), (2048, 32)])
def test_fixed_lists_fit_the_family(resolution, multiple):
    for buckets in fixed_lists(resolution, multiple).values():
        assert buckets and all(b.height % multiple == 0 and b.width % multiple == 0 for b in buckets)


@pytest.mark.parametrize("call", [lambda: choose_buckets([], resolution=64, multiple=16, most=1), lambda: choose_buckets([(64, 64)], resolution=8, multiple=16, most=1), lambda: assign((8, 8), [])])
def test_impossible_requests_are_refused(call):
    with pytest.raises(ValueError):
        call()
