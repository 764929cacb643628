"""Thinking by rules: what a prompt holds is found in English and Chinese, and nothing it names can be lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.thinking import from_json
from data_tools.thinking_named import find_numbers, language_of, lost, numeral_zh, quoted_texts
from data_tools.thinking_rules import take_apart, think_by_rules
from data_tools.thinking_text import plural, singular
from data_tools.thinking_words import COLOURS, NUMBERS, STYLES

SCENES = [
    ("three red apples and a blue cup on a wooden table", [("apple", 3, ("red",)), ("cup", 1, ("blue",)), ("table", 1, ("wooden",))],
     [("apple", "on", "table"), ("cup", "on", "table")]),
    ("a cat on a box and a dog on a chair", [("cat", 1, ()), ("box", 1, ()), ("dog", 1, ()), ("chair", 1, ())], [("cat", "on", "box"), ("dog", "on", "chair")]),
    ("two dogs next to three cats", [("dog", 2, ()), ("cat", 3, ())], [("dog", "next_to", "cat")]),
    ("a fluffy orange cat sitting to the left of a lamp", [("cat", 1, ("orange", "fluffy", "sitting")), ("lamp", 1, ())], [("cat", "left_of", "lamp")]),
    ("a house surrounded by trees", [("house", 1, ()), ("trees", 1, ())], [("trees", "around", "house")]),
    ("an icon of a steam train", [("steam train", 1, ())], []),
    ("an orange", [("orange", 1, ())], []),
    ("a bowl with two oranges", [("bowl", 1, ()), ("orange", 2, ())], [("bowl", "with", "orange")]),
    ("一只橙色的猫坐在红色盒子上面", [("猫", 1, ("橙色", "坐着")), ("盒子", 1, ("红色",))], [("猫", "on", "盒子")]),
    ("两个苹果和一个杯子在桌子上", [("苹果", 2, ()), ("杯子", 1, ()), ("桌子", 1, ())], [("苹果", "on", "桌子"), ("杯子", "on", "桌子")]),
    ("桌子上的三本书", [("书", 3, ()), ("桌子", 1, ())], [("书", "on", "桌子")]),
    ("猫在狗的左边", [("猫", 1, ()), ("狗", 1, ())], [("猫", "left_of", "狗")]),
    ("小女孩拿着一朵红色的花", [("小女孩", 1, ()), ("花", 1, ("红色",))], [("小女孩", "holding", "花")]),
]


@pytest.mark.parametrize("prompt, elements, relations", SCENES, ids=[scene[0] for scene in SCENES])
def test_elements_counts_attributes_and_relations_are_found(prompt, elements, relations):
    record = take_apart(prompt)
    names = {element.id: element.name for element in record.elements}
    assert [(element.name, element.count, element.attributes) for element in record.elements] == elements
    assert [(names[relation.a], relation.relation, names[relation.b]) for relation in record.relations] == relations


FIELDS = [
    ("dog on a red background", "environment", "red background"), ("狗，蓝色背景", "environment", "蓝色背景"), ("红色背景上的狗", "environment", "红色背景"),
    ("a cat, soft light, at night", "lighting", "soft light, at night"), ("a cat, close-up", "composition", "close-up"),
    ("a cat", "composition", "one subject in the centre"), ("猫在狗的左边", "composition", "主体左右并列"),
    ("a red cat, a navy box", "palette", ("red", "navy")), ("a cat in watercolor style", "style", ("watercolour",)), ("a cat, zorp style", "style", ("zorp style",)),
    ("一只猫，水彩风格", "style", ("水彩",)), ('a sign that says "OPEN 24h"', "text", ("OPEN 24h",)), ("招牌写着“开门”", "text", ("开门",)),
    ("a cat, masterpiece, highly detailed", "details", ("masterpiece", "highly detailed")), ("一只狗", "language", "zh"), ("a dog 狗", "language", "en"),
]


@pytest.mark.parametrize("prompt, field, value", FIELDS, ids=[f"{case[0]}: {case[1]}" for case in FIELDS])
def test_each_dimension_is_found(prompt, field, value):
    assert getattr(take_apart(prompt), field) == value


def test_enhanced_prompt_and_trace_say_the_parts_once_more():
    record = think_by_rules('three red apples on a table, watercolor, "OPEN"', trigger="zorp")
    assert record.ok
    assert record.enhanced.startswith(record.prompt)
    assert "the apples are on the table" in record.enhanced and "three red apples" in record.enhanced[len(record.prompt):]
    assert record.trace.splitlines()[0] == "Subject: three red apples; one table."
    assert 'Text: "OPEN".' in record.trace and "Lighting: left open." in record.trace


def test_chinese_trace_is_chinese():
    record = think_by_rules("两只红色的猫在盒子上")
    assert record.trace.startswith("主体：两个红色猫；盒子。")
    assert record.enhanced.startswith("两只红色的猫在盒子上。猫在盒子上面；")


def test_additions_are_dropped_from_the_end_until_they_fit():
    long = think_by_rules("three red apples on a table")
    short = think_by_rules("three red apples on a table", fits=lambda text: len(text) <= 62)
    assert short.ok and len(short.enhanced) <= 62 < len(long.enhanced)
    assert short.enhanced == "three red apples on a table. the apples are on the table"


def test_a_prompt_that_does_not_fit_is_kept_and_the_record_says_so():
    record = think_by_rules("three red apples", fits=lambda text: len(text) < 5)
    assert (record.ok, record.enhanced) == (False, "three red apples")
    assert "longer than the text encoders take" in record.reason


LOST = [
    ('a sign "OPEN"', "a sign", "OPEN"), ("three cats", "cats", "number 3"), ("3 cats", "two cats", "number 3"), ("a red cat", "a cat", "colour red"),
    ("watercolor cat", "cat", "style watercolour"), ("zorp cat", "a cat", "trigger zorp"), ("两只猫", "猫", "number 2"), ("红色的猫", "猫", "colour red"),
    ("水彩猫", "猫", "style watercolour"), ("二十三只猫", "三只猫", "number 23"), ("写着“开门”", "开", "开门"),
]
KEPT = [
    ('a sign "OPEN"', "a wooden sign with the text “OPEN”"), ("three cats", "3 cats"), ("two cats", "两只猫"), ("a red cat", "红色的猫"), ("grey cat", "gray cat"),
    ("watercolor cat", "a cat, watercolour"), ("zorp cat", "a cat in ZORP style"), ("a scared dog", "a dog"), ("it's a dog's life", "a dog"), ("16-bit", "pixel art"),
]


@pytest.mark.parametrize("prompt, enhanced, what", LOST)
def test_what_a_rewriting_loses_is_named(prompt, enhanced, what):
    assert any(what in phrase for phrase in lost(prompt, enhanced, "zorp"))


@pytest.mark.parametrize("prompt, enhanced", KEPT)
def test_other_spellings_and_languages_count_as_kept(prompt, enhanced):
    assert lost(prompt, enhanced, "zorp") == []


WORDS = st.sampled_from([word for table in (COLOURS, STYLES, NUMBERS) for words in table.values() for word in words] + [
    "a", "cat", "dogs", "on", "and", "to the left of", "surrounded by", "with", "in a park", "background", ",", ".", "猫", "在", "上面", "的", "拿着", "背景", "和",
    '"OPEN"', "“开门”", "'", '"', "zorp", "style", "7", "</think>", "<answer>", "\x00", "masterpiece", "at night"])


@settings(max_examples=250, deadline=None)
@given(st.lists(WORDS | st.text(max_size=6), max_size=20).map(" ".join), st.integers(0, 400))
def test_any_prompt_gives_a_valid_record_that_loses_nothing(prompt, room):
    record = think_by_rules(prompt, trigger="zorp", fits=lambda text: len(text) <= room)
    assert from_json(record.to_json()) == record
    assert lost(record.prompt, record.enhanced, "zorp") == []
    if record.ok:
        assert record.enhanced.startswith(record.prompt.rstrip()) and len(record.enhanced) <= room
    else:
        assert record.enhanced == record.prompt and record.reason


@pytest.mark.parametrize("prompt", ["a" * 20_000, "在" * 2000, '"' * 10_000, "on " * 3000, "anime " * 1500, "红色" * 1000, "\ud800 cat"])
def test_hostile_prompts_are_harmless(prompt):
    record = think_by_rules(prompt)
    assert from_json(record.to_json()) == record


@pytest.mark.parametrize("text, value", [("十", 10), ("二十三", 23), ("一百零五", 105), ("两", 2), ("三百", 300), ("三四", None)])
def test_chinese_numerals(text, value):
    assert numeral_zh(text) == value


@pytest.mark.parametrize("text, values", [("16-bit 3d 4k", []), ("no. 7", [7]), ("half a dozen", [6]), ("一起", []), ("v1.5", [])])
def test_only_counts_are_numbers(text, values):
    assert [value for value, _ in find_numbers(text)] == values


@pytest.mark.parametrize("one, many", [("apple", "apples"), ("box", "boxes"), ("cherry", "cherries"), ("child", "children"), ("red fox", "red foxes"), ("bus", "buses"), ("key", "keys")])
def test_plurals(one, many):
    assert (plural(one), singular(many)) == (many, one)


def test_quotes_of_all_kinds_but_no_apostrophes():
    assert quoted_texts("""it's "A B" “C” 'D e' 「F」 ‘G’ don't""") == ("A B", "C", "D e", "F", "G")


def test_language_needs_letters():
    assert [language_of(text) for text in ("", "123", "cat", "猫", "一只 cat")] == ["en", "en", "en", "zh", "zh"]


@pytest.mark.parametrize("prompt", ["dog on a green background", "红色背景上的狗", "a red fox, watercolor", "a dog and a snail"])
def test_a_prompt_without_structure_is_left_alone_and_its_layout_stays_in_the_trace(prompt):
    record = think_by_rules(prompt)
    assert record.ok and record.enhanced == prompt
    assert record.composition and record.composition in record.trace
