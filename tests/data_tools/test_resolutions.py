"""Which of several training resolutions a picture gets."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.bucket_choice import choose_buckets
from data_tools.buckets import assign
from data_tools.resolutions import fills, place_at_each

sizes = st.lists(st.tuples(st.integers(40, 700), st.integers(40, 700)), min_size=1, max_size=8)
RULES = {"multiple": 16, "most": 4}


@given(sizes, st.booleans())
@settings(deadline=None, max_examples=25)
def test_one_resolution_is_the_choice_of_buckets_as_ever(pictures, upscale):
    buckets = choose_buckets(pictures, resolution=256, upscale=upscale, **RULES)
    assert place_at_each(pictures, [256], upscale=upscale, **RULES) == [[assign(size, buckets, upscale=upscale)] for size in pictures]


@given(sizes, st.booleans())
@settings(deadline=None, max_examples=25)
def test_every_picture_has_a_place_and_no_bucket_twice(pictures, upscale):
    placed = place_at_each(pictures, [128, 256, 384], upscale=upscale, **RULES)
    assert placed == place_at_each(pictures, [384, 128, 256], upscale=upscale, **RULES)
    for places in placed:
        assert places and len({place.bucket for place in places}) == len(places)


@given(sizes)
@settings(deadline=None, max_examples=25)
def test_no_picture_is_enlarged_to_reach_a_larger_resolution(pictures):
    for (height, width), places in zip(pictures, place_at_each(pictures, [128, 256, 384], **RULES), strict=True):
        for place in places[:-1]:
            assert not place.padded and place.bucket.height <= height and place.bucket.width <= width


def test_small_pictures_stay_at_the_small_resolution_unless_enlarging_is_asked_for():
    pictures = [(1200, 1200), (300, 300)]
    kept = place_at_each(pictures, [256, 512, 1024], **RULES)
    assert [[place.bucket.height for place in places] for places in kept] == [[1024, 512, 256], [256]]
    enlarged = place_at_each(pictures, [256, 512, 1024], upscale=True, **RULES)
    assert [len(places) for places in enlarged] == [3, 3]
    assert fills((1024, 1024), 1024, 16) and not fills((1000, 1000), 1024, 16)
