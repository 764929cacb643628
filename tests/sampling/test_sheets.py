"""Sheets show every picture, as it is, beside its name."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from PIL import Image, ImageFont

from data_tools.lettering import font_for, lacking, wrap
from finetune.cli.generate_arguments import NamedAdapter
from finetune.cli.generate_output import row_name
from finetune.errors import BadInput
from finetune.sampling_sheets import before_after_sheet, contact_sheet, stack_sheets

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "navy", "teal"]


def pictures(colours, size=(16, 24)):
    return [Image.new("RGB", size, colour) for colour in colours]


def area(sheet, colour):
    pixels = numpy.asarray(sheet)
    return int((pixels == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(axis=2).sum())


def test_every_picture_is_there_and_small_ones_are_enlarged_alike():
    sheet = contact_sheet([pictures(COLOURS[:3]), pictures(COLOURS[3:5])], row_names=["one", "two"], column_names=["a", "b", "c"], title="Title")
    areas = {colour: area(sheet, colour) for colour in COLOURS[:5]}
    assert len(set(areas.values())) == 1 and areas["red"] >= 128 * 85


def test_labels_leave_ink_and_no_label_leaves_none():
    def ink(sheet):
        return int((numpy.asarray(sheet.convert("L")) < 128).sum())

    bare = contact_sheet([[Image.new("RGB", (128, 128), "white")]])
    named = contact_sheet([[Image.new("RGB", (128, 128), "white")]], column_names=["a prompt"], title="a title")
    assert ink(bare) == 0 and ink(named) > 50


def test_before_stands_above_after_and_long_sets_break_into_rows():
    sheet = before_after_sheet(pictures(["red"] * 8), pictures(["blue"] * 8), [f"prompt {i}" for i in range(8)], per_row=3)
    pixels = numpy.asarray(sheet)
    red, blue = ((pixels == colour).all(axis=2).any(axis=1).nonzero()[0] for colour in ((255, 0, 0), (0, 0, 255)))
    assert red[0] < blue[0] and red[-1] < blue[-1]
    assert area(sheet, "red") == area(sheet, "blue") == 8 * area(contact_sheet([pictures(["red"])]), "red")


def test_empty_and_uneven_sheets_are_refused():
    with pytest.raises(BadInput, match="no pictures"):
        contact_sheet([])
    with pytest.raises(BadInput, match="no pictures"):
        stack_sheets([])
    with pytest.raises(BadInput, match="as many pictures as prompts"):
        before_after_sheet(pictures(["red"]), pictures(["blue", "red"]), ["a"])


@pytest.mark.parametrize("text", ["short", "a long prompt of many words that go on and on until they cannot fit", "x" * 200, "红色背景上的狗" * 9, ""])
def test_wrapped_text_stays_within_its_place(text):
    font = ImageFont.load_default(13)
    lines = wrap(text, font, 120, 3)
    assert len(lines) <= 3 and all(font.getlength(line) <= 120 for line in lines)
    if text == "short":
        assert lines == ["short"]


def test_a_chinese_text_behind_a_word_goes_on_in_the_next_line():
    text = "my style, " + "红色背景上的狗" * 3
    font = ImageFont.load_default(13)
    assert "".join("".join(wrap(text, font, 120, 9)).split()) == "".join(text.split())
    assert wrap(text * 3, font, 120, 2)[-1].endswith("…")


def test_letters_that_pillow_lacks_are_not_drawn_as_empty_boxes():
    if lacking("ü", font_for("ü", 13)):
        pytest.skip("no font of this machine has more than Pillow's own")
    one, other = (numpy.asarray(contact_sheet([pictures(["white"])], column_names=[letter])) for letter in "üж")
    assert one.shape == other.shape and (one != other).any()


def test_a_row_is_named_in_letters_that_every_machine_draws():
    name = row_name({"adapter_brand": 0.5}, [NamedAdapter("adapter_brand", "brand", Path("brand"), (0.5,))])
    assert name == "brand x 0.5" and not lacking(name, ImageFont.load_default(14))
