"""Cleaning answers and editing captions by rule, with a dry run and undo."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import caption_edits as edits
from data_tools.caption_cleanup import clean_answer, style_words
from data_tools.errors import DataError
from data_tools.scan import scan_folder
from tests.data_tools.pictures import save

ANSWERS = [
    ("Sure! Here is a caption: **A fox** on a bench.", "A fox on a bench.", ""),
    ("The image shows a fox on a bench. Overall, the mood is calm.", "A fox on a bench.", ""),
    ("In this image, there is a dog.", "A dog.", ""),
    ("这张图片展示了一只狐狸坐在长椅上。总的来说，很美。", "一只狐狸坐在长椅上。", ""),
    ("<think>hmm</think>A fox.", "A fox.", ""), ("<think>hm</think><answer>A fox sits.</answer>", "A fox sits.", ""), ("<think>never closed", "", "never closed"),
    ("Caption: red house", "red house", ""), ("“一只猫”", "一只猫", ""), ('"A quoted fox."', "A quoted fox.", ""), ('A sign says "OPEN" and "NOW"', 'A sign says "OPEN" and "NOW"', ""),
    ("```\nA fox.\n```", "A fox.", ""), ("- A fox\n- A bench", "A fox A bench", ""),
    ("I'm sorry, I can't help with that.", "", "a refusal"), ("As an AI, I cannot see pictures.", "", "a refusal"), ("抱歉，我无法描述这张图片。", "", "a refusal"),
    ("<!doctype html><html>502 Bad Gateway", "", "error message"), ("Rate limit of 10 requests exceeded", "", "error message"),
    ("", "", "no prompt"), ("...", "", "empty answer"), ("a cat " * 40, "", "repeats itself"),
]


@pytest.mark.parametrize(("raw", "text", "problem"), ANSWERS, ids=range(len(ANSWERS)))
def test_answers_become_captions_or_say_why_not(raw, text, problem):
    cleaned = clean_answer(raw)
    assert cleaned.text == text and problem in cleaned.problem and bool(cleaned.problem) == (not text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300), st.booleans())
def test_any_answer_gives_one_clean_line_or_a_problem(raw, cut):
    cleaned = clean_answer(raw, cut=cut)
    assert bool(cleaned.text) != bool(cleaned.problem) and len(cleaned.text.splitlines()) <= 1 and "\x00" not in cleaned.text


def test_words_about_style_are_found_in_both_languages():
    assert style_words("a watercolour fox, digital art") == ["watercolour", "digital-art"] and style_words("水彩的狐狸") == ["水彩"] and style_words("a fox") == []


RULES = [
    (edits.prepend("brndx, "), "a, b", "brndx, a, b"), (edits.prepend("brndx, "), "brndx, a", "brndx, a"), (edits.append(", end"), "a", "a, end"), (edits.replace("a", "o"), "banana", "bonono"),
    (edits.replace(r"\bcat\b", "dog", regex=True), "cat, cats", "dog, cats"), (edits.drop_parts(["B", "x"]), "a, b, c", "a, c"), (edits.drop_parts(["no"]), "a,b", "a,b"), (edits.keep_first(2), "a, b, c", "a, b"), (edits.keep_first(2), "红，蓝，绿", "红，蓝"),
]


@pytest.mark.parametrize(("rule", "before", "after"), RULES, ids=range(len(RULES)))
def test_rules(rule, before, after):
    assert rule(before, "k") == after


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abcxyz", min_size=1, max_size=4), min_size=1, max_size=8), st.integers(0, 8), st.integers(0, 5))
def test_shuffling_keeps_every_part_and_the_first_ones_in_place(parts, keep, seed):
    rule = edits.shuffle(keep, seed)
    result = edits.parts_of(rule(", ".join(parts), "file"))
    assert sorted(result) == sorted(parts) and result[:keep] == parts[:keep] and rule(", ".join(parts), "file") == rule(", ".join(parts), "file")


def contents(folder):
    return {p.name: p.read_text() for p in folder.glob("*.txt")}


def test_a_plan_changes_nothing_an_edit_does_and_undo_brings_it_back(folder):
    before = contents(folder)
    changes = edits.plan_edits(scan_folder(folder, workers=1).records, [edits.replace("brndx, ", ""), edits.append(", shown")])
    assert contents(folder) == before and len(changes) == 5 and changes[0].after == "a shape number 0, on paper, shown"
    edits.apply_edits(changes, folder)
    assert contents(folder)["000.txt"] == "a shape number 0, on paper, shown\n"
    (folder / "003.txt").write_text("touched since")
    restored, left = edits.undo(folder)
    assert len(restored) == 4 and [p.name for p in left] == ["003.txt"]
    assert {**before, "003.txt": "touched since"} == contents(folder)
    with pytest.raises(DataError, match="no edit to undo"):
        edits.undo(folder)


@pytest.mark.parametrize("call", [lambda: edits.replace("(", "x", regex=True), lambda: edits.replace("a", r"\9", regex=True), lambda: edits.replace("", "x")])
def test_a_broken_rule_is_refused(call):
    with pytest.raises(DataError):
        call()


def test_what_is_taken_back_is_the_file_as_it_was(tmp_path):
    """Lines that an edit had joined stayed joined."""
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one line\n  another line\n\n")
    edits.apply_edits(edits.plan_edits(scan_folder(tmp_path, workers=1).records, [edits.append(", more")]), tmp_path)
    assert (tmp_path / "a.txt").read_text() == "one line another line, more\n"
    edits.undo(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "one line\n  another line\n\n"
