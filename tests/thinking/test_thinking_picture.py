"""The trace is drawn beside its picture and stored where it is found again."""

import numpy as np
import pytest
from PIL import Image

from data_tools.lettering import wrapped
from data_tools.thinking import from_json, read_record, thinking_path
from finetune.sampling import read_settings, save_picture
from finetune.thinking.enhancers import think
from finetune.thinking.lettering import drawable, font_for
from finetune.thinking.picture import SETTINGS_NAME, picture_with_trace, settings_with_record, shown_record, store_beside

RECORDS = [think('three red apples on a table, watercolor, "OPEN"'), think("一只红色的猫在盒子上面"), think("a cat").given_up("lost")]


@pytest.mark.parametrize("record", RECORDS, ids=["english", "chinese", "given up"])
def test_the_panel_stands_beside_the_picture_and_has_letters(record):
    page = picture_with_trace(Image.new("RGB", (64, 48), "#336699"), record)
    pixels = np.asarray(page)
    assert (pixels[:400, :400] == (0x33, 0x66, 0x99)).all()
    panel = pixels[:, -440:].astype(int).sum(2)
    assert 0.005 < (panel < 300).mean() < 0.3


def test_long_and_hostile_texts_stay_inside_the_panel():
    record = think("a " + "very" * 200 + " cat <b>&amp; \u202e abc")
    page = np.asarray(picture_with_trace(Image.new("RGB", (512, 512)), record)).astype(int).sum(2)
    assert (page[:, -6:] > 700).all()


def test_without_a_chinese_font_the_panel_says_so_in_place_of_empty_boxes(monkeypatch):
    monkeypatch.setattr("data_tools.lettering.SYSTEM_FONTS", ())
    assert font_for("猫", 14) is None
    assert drawable("猫", "instead") == "instead" and drawable("cat", "instead") == "cat"
    assert picture_with_trace(Image.new("RGB", (64, 64)), RECORDS[1]).width > 500


def test_lines_are_no_wider_than_asked_and_keep_every_character():
    font = font_for("", 14)
    text = "some words and averyveryverylongwordwithoutanyspaceatall in a row"
    lines = wrapped(text, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_the_record_is_in_the_png_and_beside_it(tmp_path):
    path = tmp_path / "cat.png"
    save_picture(Image.new("RGB", (8, 8)), path, settings_with_record({"seed": 1}, RECORDS[1]))
    store_beside(path, RECORDS[1])
    settings = read_settings(path)
    assert settings["seed"] == 1
    assert from_json(settings[SETTINGS_NAME]) == read_record(thinking_path(path)) == RECORDS[1]


def test_what_the_command_prints_of_a_record():
    shown = shown_record(RECORDS[0])
    assert {"elements", "relations", "style", "trace", "enhanced", "ok"} <= set(shown)
    assert shown["elements"][0] == {"id": "e1", "name": "apple", "count": 3, "attributes": ["red"]}
