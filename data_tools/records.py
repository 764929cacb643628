"""The record of one picture and of what is known about it; the same for every layout that people have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# Who wrote a caption, the most trusted first: a person's words are used before a model's, a guess from a name comes last.
CAPTION_SOURCES = ("person", "model", "file_name", "folder_name")
CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
LETTER = re.compile(r"[^\W\d_]")
# What a terminal obeys instead of showing it, and halves of characters, which no encoding can write.
UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def language_of(text: str) -> str:
    """"zh" when at least a third of the letters are Chinese characters, else "en"."""
    chinese = len(CHINESE.findall(text))
    return "zh" if chinese and chinese * 3 >= len(LETTER.findall(text)) else "en"


@dataclass(frozen=True, slots=True)
class Caption:
    """One description of a picture.

    language: "en", "zh" or another ISO 639-1 code.  kind: "plain" or "thinking" (JSON text of a thinking record).
    source: one of `CAPTION_SOURCES`.
    """

    text: str
    language: str = "en"
    kind: str = "plain"
    source: str = "person"

    @classmethod
    def written(cls, text: str, source: str = "person", kind: str = "plain") -> Caption:
        """A caption whose language is told from its letters."""
        return cls(text, language_of(text), kind, source)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A picture that is not used. `reason` is for people; `code` is the kind of reason, for counting and tests."""

    path: Path
    reason: str
    code: str = "unreadable"


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One usable picture.

    width, height: pixels after orientation.  content_hash: SHA-256 of the file's bytes, hex.
    repeats: times the picture is seen in one pass over the data.  split: "train", "held_out" or "regularisation".
    warnings: what was odd but did not keep the picture from being used.
    """

    path: Path
    width: int
    height: int
    content_hash: str
    captions: tuple[Caption, ...] = ()
    mask: Path | None = None
    licence: str | None = None
    layout: str = "sidecars"
    repeats: int = 1
    split: str = "train"
    warnings: tuple[str, ...] = ()

    @property
    def caption(self) -> str | None:
        """The plain caption to train on, a person's before a model's; None when there is none."""
        best = best_caption(self.captions)
        return best.text if best else None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, as buckets take it."""
        return self.height, self.width


def best_caption(captions: Iterable[Caption], kind: str = "plain", language: str | None = None) -> Caption | None:
    """The first non-empty caption of this kind (and language) from the most trusted source; None without one."""
    fitting = [c for c in captions if c.kind == kind and c.text and language in (None, c.language)]
    return min(fitting, key=lambda caption: _trust(caption.source), default=None)


def _trust(source: str) -> int:
    return CAPTION_SOURCES.index(source) if source in CAPTION_SOURCES else len(CAPTION_SOURCES)


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture that a layout names, before anybody opened it. Fields as in `ImageRecord`."""

    path: Path
    captions: tuple[Caption, ...] = ()
    mask: Path | None = None
    licence: str | None = None
    layout: str = "sidecars"
    repeats: int = 1
    split: str = "train"
    warnings: tuple[str, ...] = ()


@dataclass
class Reading:
    """What a layout says a folder or file holds.

    entries: pictures to open, in a stable order.  left_out: pictures that cannot even be tried (a row without its file).
    notes: decisions the user should hear (the layout found, which of two wins).  warnings: things that look wrong.
    other_files: files that are neither pictures nor captions, not counted as pictures.
    """

    layout: str
    entries: list[Entry] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    other_files: list[Path] = field(default_factory=list)


def shown_name(path: Path | str) -> str:
    """A file name that is safe to print: bytes that are not UTF-8 and control characters are written as escapes."""
    text = str(path).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown_text(text: str) -> str:
    """Text that is safe on a terminal, whatever names and captions it holds: control characters but line breaks and tabs are escaped."""
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shown_line(text: str) -> str:
    """The same on one line: line breaks are escaped too."""
    return shown_text(text).replace("\n", "\\n")
