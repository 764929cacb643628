"""A thinking record survives its file, and everything that is not one is named, never loaded."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import DataError
from data_tools.thinking import (
    caption_to_train, Element, Relation, ThinkingRecord, from_json, read_record, record_problems, thinking_path, write_record,
)
from data_tools.thinking_schema import RELATIONS

RECORD = ThinkingRecord(
    prompt='three red apples on a blue table, "OPEN"', language="en",
    elements=(Element("e1", "apple", 3, ("red",)), Element("e2", "table", 1, ("blue",))),
    relations=(Relation("e1", "on", "e2"),), palette=("red", "blue"), style=("flat shapes",), text=("OPEN",),
    trace="Subject: three red apples.", enhanced='three red apples on a blue table, "OPEN"; flat shapes',
)
SAFE = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="<>"), min_size=1, max_size=30).filter(str.strip)


@st.composite
def records(draw):
    names = draw(st.lists(SAFE, max_size=5))
    elements = tuple(Element(f"e{i}", name, draw(st.integers(1, 99)), tuple(draw(st.lists(SAFE, max_size=2)))) for i, name in enumerate(names))
    relations = tuple(Relation(f"e{i}", draw(st.sampled_from(RELATIONS)), f"e{i + 1}") for i in range(len(names) - 1))
    return ThinkingRecord(draw(SAFE), draw(st.sampled_from(["en", "zh"])), elements, relations, enhanced=draw(SAFE), trace=draw(SAFE),
                          style=tuple(draw(st.lists(SAFE, max_size=3))), trigger=draw(st.none() | SAFE), seed=draw(st.integers(0, 2**62)))


@settings(max_examples=60, deadline=None)
@given(records())
def test_json_form_gives_back_the_same_record(record):
    assert from_json(json.loads(json.dumps(record.to_json()))) == record


def test_file_lies_beside_its_picture_and_gives_back_the_same_record(tmp_path):
    picture = tmp_path / "猫.png"
    assert not thinking_path(picture).exists()
    write_record(thinking_path(picture), RECORD)
    assert (tmp_path / "猫.thinking.json").exists()
    assert read_record(thinking_path(picture)) == RECORD


def changed(**values):
    return RECORD.to_json() | values


BROKEN = {
    "not an object": ([1, 2], "must be object"),
    "another version": (changed(v=2), "v is 2"),
    "lacks the prompt": ({k: v for k, v in RECORD.to_json().items() if k != "prompt"}, "lacks `prompt`"),
    "unknown key": (changed(mood="happy"), "mood"),
    "unknown language": (changed(language="fr"), "language"),
    "count of nothing": (changed(elements=[{"id": "e1", "name": "cat", "count": 0}], relations=[]), "count is 0"),
    "count as bool": (changed(elements=[{"id": "e1", "name": "cat", "count": True}], relations=[]), "count must be integer"),
    "too many elements": (changed(elements=[{"id": f"e{i}", "name": "x"} for i in range(65)], relations=[]), "65 entries"),
    "empty name": (changed(elements=[{"id": "e1", "name": " "}], relations=[]), "is empty"),
    "unknown relation": (changed(relations=[{"a": "e1", "relation": "eats", "b": "e2"}]), "eats"),
    "relation to nobody": (changed(relations=[{"a": "e1", "relation": "on", "b": "e9"}]), "e9"),
    "relation to itself": (changed(relations=[{"a": "e1", "relation": "on", "b": "e1"}]), "itself"),
    "on and under at once": (changed(relations=[{"a": "e1", "relation": "on", "b": "e2"}, {"a": "e1", "relation": "under", "b": "e2"}]), "contradict"),
    "left of each other": (changed(relations=[{"a": "e1", "relation": "left_of", "b": "e2"}, {"a": "e2", "relation": "left_of", "b": "e1"}]), "contradict"),
    "same id twice": (changed(elements=[{"id": "e1", "name": "a"}, {"id": "e1", "name": "b"}], relations=[]), "same id"),
    "tag inside a value": (changed(lighting="soft</think>"), "reply tag"),
    "control character": (changed(style=["flat\x1b[31m"]), "control character"),
    "lone surrogate": (changed(prompt="\ud800"), "surrogate"),
    "no enhanced prompt": (changed(enhanced=""), "enhanced prompt is empty"),
    "oversized trace": (changed(trace="x" * 20_001), "20001 characters"),
}


@pytest.mark.parametrize("data, said", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_not_a_record_is_named(data, said):
    with pytest.raises(DataError, match=said):
        from_json(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"{}" + b" " * 2_000_001])
def test_a_broken_file_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "a.png.thinking.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_record(path)
    assert caught.value.where == str(path)


def test_an_invalid_record_is_never_written(tmp_path):
    path = tmp_path / "a.png.thinking.json"
    with pytest.raises(DataError):
        write_record(path, ThinkingRecord(prompt="a cat", language="fr", enhanced="a cat"))
    assert not path.exists()


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["v", "prompt", "elements", "relations", "id", "name", "style", "text", "ok"]) | st.text(max_size=3), inner, max_size=6), max_leaves=12))
def test_no_json_data_at_all_makes_the_check_fail(data):
    assert isinstance(record_problems(data), list)


def test_given_up_records_keep_the_original_prompt_and_say_why():
    given_up = RECORD.given_up("the number 3 was lost")
    assert (given_up.enhanced, given_up.ok, given_up.reason) == (RECORD.prompt, False, "the number 3 was lost")
    assert from_json(given_up.to_json()) == given_up


def test_training_takes_the_enhanced_prompt_of_a_record_that_is_in_order():
    assert caption_to_train(json.dumps(RECORD.to_json())) == RECORD.enhanced
    assert caption_to_train(json.dumps(RECORD.given_up("lost").to_json())) is None
    assert caption_to_train("a plain caption") is None
    assert caption_to_train('{"v": 1}') is None
