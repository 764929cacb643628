"""Which words a picture is trained with."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.training.caption_choice import SHUFFLED_VARIANTS, caption_choice, shuffled, with_trigger

parts = st.lists(st.text("abcdefg ", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1, max_size=6)


def choice_of(captions, **changes):
    settings_ = dict(trigger=None, shuffle=False, kept_parts=1, dropout=0.0, seed=0) | changes
    return caption_choice(captions, **settings_)


@pytest.mark.parametrize("caption, trigger, expected", [
    ("a cat", "sks", "sks, a cat"),
    ("a SKS cat", "sks", "a SKS cat"),
    ("", "sks", "sks"),
    ("a cat", None, "a cat"),
    ("一只猫", "水墨风", "水墨风, 一只猫"),
])
def test_the_trigger_stands_in_front_exactly_once(caption, trigger, expected):
    assert with_trigger(caption, trigger) == expected
    assert with_trigger(expected, trigger) == expected


@given(parts, st.integers(0, 4), st.integers(0, 50))
@settings(deadline=None, max_examples=60)
def test_shuffling_keeps_every_part_and_the_first_ones_in_place(words, kept, variant):
    result = shuffled(", ".join(words), kept, None, 0, 3, variant).split(", ")
    assert Counter(result) == Counter(words)
    assert result[:kept] == words[:kept]


def test_shuffling_never_moves_the_trigger_from_the_front():
    for variant in range(SHUFFLED_VARIANTS):
        assert shuffled("sks style, one, two, three", 0, "sks style", 0, 0, variant).startswith("sks style, ")


def test_every_caption_a_step_can_ask_for_is_known_before_training():
    choice = choice_of([["a, b, c, d"], ["e, f, g"]], shuffle=True, dropout=0.3, trigger="t")
    known = set(choice.every_caption())
    assert {choice.at(picture, step, picture) for picture in (0, 1) for step in range(200)} <= known
    assert "" in known and len(known) > 8


def test_dropout_drops_about_its_share_and_zero_drops_nothing():
    dropped = sum(choice_of([["a"]], dropout=0.25).at(0, step, 0) == "" for step in range(2000))
    assert 400 < dropped < 600
    assert all(choice_of([["a"]]).at(0, step, 0) == "a" for step in range(200))


def test_all_captions_of_a_picture_are_used():
    assert {choice_of([["a", "b", "c"]]).at(0, step, 0) for step in range(100)} == {"a", "b", "c"}


def test_pictures_that_stay_without_the_trigger_have_their_plain_captions():
    assert choice_of([["a cat"], ["a dog"]], trigger="sks", untriggered={1}).variants == (("sks, a cat",), ("a dog",))
