"""Text of a trace: whether this machine can draw it at all, Chinese above all."""

from __future__ import annotations

from typing import Any

from data_tools import lettering
from data_tools.thinking_named import CJK


def font_for(text: str, size: int) -> Any | None:
    """A font of `size` pixels for `text`, or None when this machine has none with its Chinese characters."""
    font = lettering.font_for(text, size)
    return None if any(CJK.match(character) for character in lettering.lacking(text, font)) else font


def drawable(text: str, instead: str) -> str:
    """`text`, or `instead` (Latin letters) where no font on this machine can draw it: no row of empty boxes."""
    return text if font_for(text, 12) is not None else instead
