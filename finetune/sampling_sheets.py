"""Labelled sheets of pictures: a grid with names, and before above after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_tools.lettering import font_for, wrap
from finetune.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

PAPER, INK, FAINT = "#ffffff", "#1c1c1c", "#6a6a6a"
GAP = 8
SMALLEST_CELL = 128  # pixels: small pictures are enlarged to whole multiples, so that labels and pictures can be seen


def _cell_size(pictures: Sequence[Image]) -> tuple[int, int]:
    """(height, width) of the cell: the largest picture, enlarged by a whole factor where it is small."""
    height, width = max(p.height for p in pictures), max(p.width for p in pictures)
    factor = max(1, -(-SMALLEST_CELL // max(height, width)))
    return height * factor, width * factor


def _fit(picture: Image, cell: tuple[int, int]) -> Image:
    from PIL import Image as images

    scale = min(cell[0] / picture.height, cell[1] / picture.width)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if size == picture.size:
        return picture
    # Nearest shows the pixels of a tiny picture as they are; a smooth filter would hide what the model drew.
    return picture.resize(size, images.Resampling.NEAREST if scale >= 1 else images.Resampling.LANCZOS)


def contact_sheet(rows: Sequence[Sequence[Image]], *, row_names: Sequence[str] = (), column_names: Sequence[str] = (), title: str = "") -> Image:
    """A grid of pictures with names of rows at the left, of columns on top, and a title. Rows may differ in length.

    Raises BadInput when there is no picture at all.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    every = [picture for row in rows for picture in row]
    if not every:
        raise BadInput("there are no pictures to put on a sheet")
    cell = _cell_size(every)
    columns = max(len(row) for row in rows)
    left = max((int(font_for(n, 14).getlength(n)) + 1 for n in row_names), default=0)
    left = min(left, 180) + 2 * GAP if row_names else GAP
    width = left + columns * (cell[1] + GAP)
    large, small = font_for(title, 18), font_for("".join(column_names), 13)
    heading = wrap(title, large, width - 2 * GAP, 3) if title else []
    top = GAP + len(heading) * 24
    heads = [wrap(name, small, cell[1], 3) for name in column_names]
    head_height = max((len(h) for h in heads), default=0) * 17
    sheet = images.new("RGB", (width, top + head_height + len(rows) * (cell[0] + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, line in enumerate(heading):
        pen.text((GAP, GAP + index * 24), line, INK, large)
    for column, lines in enumerate(heads[:columns]):
        for index, line in enumerate(lines):
            pen.text((left + column * (cell[1] + GAP), top + index * 17), line, INK, small)
    for number, row in enumerate(rows):
        y = top + head_height + number * (cell[0] + GAP) + GAP // 2
        if number < len(row_names):
            font = font_for(row_names[number], 14)
            for index, line in enumerate(wrap(row_names[number], font, left - 2 * GAP, 4)):
                pen.text((GAP, y + cell[0] // 2 - 10 + index * 18), line, FAINT, font)
        for column, picture in enumerate(row):
            shown = _fit(picture.convert("RGB"), cell)
            x = left + column * (cell[1] + GAP)
            sheet.paste(shown, (x + (cell[1] - shown.width) // 2, y + (cell[0] - shown.height) // 2))
    return sheet


def before_after_sheet(before: Sequence[Image], after: Sequence[Image], prompts: Sequence[str], *, title: str = "", truth: Sequence[Image] = (),
                       per_row: int = 6) -> Image:
    """Pictures of the same prompts and seeds before and after training, one above the other, at most `per_row` a line.

    truth: where known, true pictures of the same subjects in the new style, shown below.
    """
    if len(before) != len(after) or len(before) != len(prompts):
        raise BadInput(f"a before/after sheet needs as many pictures as prompts: {len(before)}, {len(after)}, {len(prompts)}")
    sheets = []
    for start in range(0, len(before), per_row):
        part = slice(start, start + per_row)
        rows, names = [before[part], after[part]], ["before", "after"]
        if truth:
            rows, names = [*rows, truth[part]], [*names, "true"]
        sheets.append(contact_sheet(rows, row_names=names, column_names=prompts[part], title=title if start == 0 else ""))
    return stack_sheets(sheets)


def stack_sheets(sheets: Sequence[Image]) -> Image:
    """Sheets under each other on one page."""
    from PIL import Image as images

    if not sheets:
        raise BadInput("there are no pictures to put on a sheet")
    page = images.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    y = 0
    for sheet in sheets:
        page.paste(sheet, (0, y))
        y += sheet.height
    return page
