"""Text on pictures is drawn with a font that has its letters, where this machine has one."""

from __future__ import annotations

import pytest
from PIL import Image, ImageFont

from data_tools import lettering
from data_tools.contact_sheets import CELL, write_sheet
from data_tools.lettering import font_for, lacking

# Some font of a usual system has each of these; Pillow's own has none of them.
BEYOND_ASCII = ["Grün, très naïf", "кошка", "一只红色的狐狸", "brand × 0.5"]


@pytest.mark.parametrize("text", BEYOND_ASCII)
def test_a_font_of_the_system_is_taken_where_the_own_one_lacks_a_letter(text, monkeypatch):
    own = ImageFont.load_default(14)
    assert lacking(text, own) and not lacking("a cat, 3 dogs...", own)
    wide = _Font("".join(BEYOND_ASCII))
    real = lettering._opened
    monkeypatch.setattr(lettering, "_opened", lambda name, size: wide if name == "msyh.ttc" else real("", size) if not name else None)
    assert font_for(text, 14) is wide
    assert font_for("a cat", 14) is not wide


def test_without_a_font_that_has_all_the_one_that_lacks_fewest_is_taken(monkeypatch):
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ())
    assert font_for("Grün", 14).getlength("Grün") > 0


def test_long_names_stay_under_their_picture(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("W" * 40, "红色的狐狸和蓝色的房子" * 4)]
    for path in paths:
        Image.new("RGB", (32, 32), "#f7f5f0").save(path)
    write_sheet(tmp_path / "sheet.png", [paths])
    with Image.open(tmp_path / "sheet.png") as sheet:
        between = sheet.convert("L").crop((24 + CELL, 24, 24 + CELL + 12, sheet.height))
    assert between.getextrema()[0] > 200


class _Font:
    """Has these characters and no other."""

    def __init__(self, characters):
        self.characters = characters

    def getmask(self, character):
        return _Mask(character if character in self.characters else "")


class _Mask(bytes):
    size = (1, 1)

    def __new__(cls, character):
        return super().__new__(cls, character.encode())
