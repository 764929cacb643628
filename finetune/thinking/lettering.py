"""Text on pictures in English and Chinese: a font that can draw it is looked for on this machine, none is shipped."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache
from typing import Any

from data_tools.thinking_named import CJK

# Fonts with Chinese characters under the names that common systems give them; Pillow finds them in the system's folders.
CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "NotoSansSC[wght].ttf", "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Light.ttc",
    "msyh.ttc", "simhei.ttf", "simsun.ttc", "Arial Unicode.ttf",
)
# One character or one Latin word with the space behind it: the pieces between which a line may end.
PIECES = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]|[^\s\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]+\s*|\s+")


@lru_cache(maxsize=32)
def _font(size: int, chinese: bool) -> Any:
    from PIL import ImageFont

    if not chinese:
        return ImageFont.load_default(size)
    for name in CHINESE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def font_for(text: str, size: int) -> Any | None:
    """A font of `size` pixels that has the characters of `text`, or None when this machine has none."""
    return _font(size, CJK.search(text) is not None)


def drawable(text: str, instead: str) -> str:
    """`text`, or `instead` (Latin letters) where no font on this machine can draw it: no row of empty boxes."""
    return text if font_for(text, 12) is not None else instead


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
