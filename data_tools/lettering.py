"""Text on pictures: a font that has its letters, and lines of a width. Pillow's own font has little beyond ASCII, so one of the
system's is looked for where it lacks a letter; none is shipped."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache
from typing import Any

# Under the names that common systems give them; Pillow finds them in the system's folders. Those with Chinese have Latin and Cyrillic too.
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "NotoSansSC[wght].ttf", "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Light.ttc",
    "msyh.ttc", "simhei.ttf", "simsun.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "Arial.ttf", "arial.ttf",
)
NO_CHARACTER = "\uffff"  # in no font: drawn as the font's sign for what it lacks
# One character or one Latin word with the space behind it: the pieces between which a line may end.
PIECES = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]|[^\s\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]+\s*|\s+")


@lru_cache(maxsize=128)
def _opened(name: str, size: int) -> Any | None:
    """A font by its name, "" for Pillow's own; None where this machine has none of this name."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


def _drawn(font: Any, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def lacking(text: str, font: Any) -> set[str]:
    """The characters of `text` that `font` does not have."""
    unknown = _drawn(font, NO_CHARACTER)
    return {character for character in set(text) if not character.isspace() and _drawn(font, character) == unknown}


def font_for(text: str, size: int) -> Any:
    """A font of `size` pixels that has all characters of `text`, else of this machine's fonts the one that lacks fewest."""
    best = _opened("", size)
    fewest = len(lacking(text, best))
    for name in SYSTEM_FONTS:
        if not fewest:
            break
        other = _opened(name, size)
        if other is not None and (count := len(lacking(text, other))) < fewest:
            best, fewest = other, count
    return best


def _fitting(line: str, word: str, font: Any, width: int) -> int:
    """How many first characters of `word` still fit behind `line`."""
    # A glyph is at least a pixel wide, so longer pieces need not be measured.
    return bisect_right(range(1, min(len(word), width)), width, key=lambda end: font.getlength(line + word[:end]))


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most `width` pixels; a single word that is wider is cut."""
    lines, line = [], ""
    for piece in PIECES.findall(" ".join(text.split())):
        while len(piece) > 1 and font.getlength(piece[:width].rstrip()) > width:
            cut = _fitting(line, piece, font, width) or (0 if line else 1)
            lines.append((line + piece[:cut]).rstrip())
            line, piece = "", piece[cut:]
        if line and font.getlength((line + piece).rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
    return [*lines, line.rstrip()] if line.strip() else lines


def wrap(text: str, font: Any, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; what does not fit ends in an ellipsis."""
    found = wrapped(text, font, width)
    if len(found) <= lines:
        return found
    last = found[lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*found[:lines - 1], last.rstrip() + "…"]
