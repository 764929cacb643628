"""Contact sheets as one picture file: a row for each group, small pictures with their names below."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from data_tools.atomic_files import write_bytes
from data_tools.errors import DataError
from data_tools.images import BadPicture, open_image
from data_tools.lettering import font_for, wrap
from data_tools.progress import Progress
from data_tools.records import shown_name

CELL, LABEL, GAP, MARGIN, LETTERS = 176, 18, 12, 24, 12  # pixels
PAPER, INK, LINE = "#f7f5f0", "#211d1a", "#e2dcd2"
MOST_IN_A_ROW, MOST_ROWS = 8, 200


def check_sheet_name(path: Path) -> None:
    """Raises DataError for a file that is no picture by its name."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise DataError("a contact sheet is a .png or .jpg file", where=shown_name(path))


def write_sheet(path: Path, groups: Sequence[Sequence[Path]], progress: Progress = Progress()) -> None:
    """Draw the groups, at most 200 rows of 8, and write the sheet as PNG or JPEG by the name's ending."""
    check_sheet_name(path)
    rows = [list(group[:MOST_IN_A_ROW]) for group in groups[:MOST_ROWS]]
    columns = max((len(row) for row in rows), default=1)
    height = CELL + LABEL + GAP
    sheet = Image.new("RGB", (2 * MARGIN + columns * (CELL + GAP) - GAP, 2 * MARGIN + max(1, len(rows)) * height), PAPER)
    pen = ImageDraw.Draw(sheet)
    with progress.phase("drawing the contact sheet", len(rows)) as advance:
        for number, (row, group) in enumerate(zip(rows, groups, strict=False)):
            top = MARGIN + number * height
            if number:
                pen.line((MARGIN, top - GAP // 2, sheet.width - MARGIN, top - GAP // 2), LINE)
            for column, picture in enumerate(row):
                _draw(sheet, pen, picture, MARGIN + column * (CELL + GAP), top)
            if len(group) > len(row):
                pen.text((MARGIN + len(row) * (CELL + GAP) - 70, top), f"+ {len(group) - len(row)}", INK, font_for("+", LETTERS))
            advance(1)
    encoded = BytesIO()
    sheet.save(encoded, "PNG" if path.suffix.lower() == ".png" else "JPEG", **({} if path.suffix.lower() == ".png" else {"quality": 88}))
    write_bytes(path, encoded.getvalue())


def _draw(sheet: Image.Image, pen: ImageDraw.ImageDraw, picture: Path, left: int, top: int) -> None:
    try:
        image = open_image(picture)
        image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS, reducing_gap=3.0)
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
    except BadPicture:
        pen.rectangle((left, top, left + CELL, top + CELL), outline=LINE)
    name = shown_name(picture.name)
    font = font_for(name, LETTERS)
    pen.text((left, top + CELL + 2), "".join(wrap(name, font, CELL, 1)), INK, font)
