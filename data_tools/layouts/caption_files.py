"""Caption files beside pictures: which one belongs to which picture, and their text in whatever encoding it came."""

from __future__ import annotations

import codecs
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.errors import DataError
from data_tools.images import Limits, read_bytes
from data_tools.records import CHINESE, Caption, shown_name
from data_tools.thinking import from_json as thinking_from_json

LARGEST_CAPTION_FILE = 2**20  # bytes
LONG_CAPTION = 5_000  # characters beyond which a caption is worth a warning
CAPTION_SUFFIXES = (".txt", ".caption")
THINKING_SUFFIX = ".thinking.json"
ENDINGS = (THINKING_SUFFIX, *CAPTION_SUFFIXES, ".json")  # longer ones first
# Invisible characters that captions pick up on the web: controls, zero-width, bidirectional overrides, byte-order mark; and halves of
# characters, which JSON can hold ("\ud83d") and no text encoder can read.
INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ud800-\udfff\ufeff]")


def read_text(path: Path, *, largest: int = LARGEST_CAPTION_FILE) -> str:
    """Text in UTF-8 (with or without byte-order mark), UTF-16 with one, or GB18030 when that gives Chinese.

    Raises DataError naming the file and the byte when it is none of these; bytes are never dropped.
    """
    content = read_bytes(path, Limits(file_bytes=largest)) if os.path.getsize(path) else b""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataError(f"broken UTF-16 at byte {error.start}", where=shown_name(path)) from None
    if b"\x00" in content:
        raise DataError("zero bytes: not a text file", where=shown_name(path))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _other_encoding(content, error.start, path)


def _other_encoding(content: bytes, place: int, path: Path) -> str:
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        text = ""
    if len(CHINESE.findall(text)) * 2 >= len([c for c in text if ord(c) > 127]) > 0:
        return text
    raise DataError(f"not UTF-8 at byte {place}", where=shown_name(path), fix="save the file as UTF-8")


def clean_line(text: str) -> str:
    """One line: lines joined by a space, invisible characters out, spaces folded, NFC."""
    visible = INVISIBLE.sub("", " ".join(text.splitlines()).replace("\t", " "))
    return unicodedata.normalize("NFC", " ".join(visible.split()))


def caption_of(value: object, source: str = "person") -> list[Caption]:
    """Captions from a JSON value: a text, a list of texts or tags, or a mapping {text, language, kind, source}."""
    if isinstance(value, str):
        text = clean_line(value)
        return [Caption.written(text, source)] if text else []
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        kind = str(value.get("kind", "plain"))
        text = clean_line(value["text"]) if kind == "plain" else value["text"]
        found = Caption.written(text, str(value.get("source", source)), kind)
        return [Caption(text, str(value["language"]), kind, found.source) if "language" in value else found] if text else []
    if isinstance(value, (list, tuple)):
        return [caption for part in value for caption in caption_of(part, source)]
    return []


def ending_folded(name: str) -> str:
    """A file name in NFC with its ending in small letters: what a.TXT and a.txt share. Names of no caption file stay as they are."""
    name = unicodedata.normalize("NFC", name)
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)] + ending


class FilesBeside:
    """The caption files that are there under any case of their ending. Each folder is listed once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, str]] = {}

    def there(self, wanted: Path) -> Path:
        """`wanted`, or the file beside it that differs by the case of its ending alone."""
        if wanted.parent not in self._folders:
            names = sorted(os.listdir(wanted.parent), reverse=True) if wanted.parent.is_dir() else ()
            self._folders[wanted.parent] = {ending_folded(name): name for name in names if name != ending_folded(name)}
        return wanted if wanted.is_file() else wanted.with_name(self._folders[wanted.parent].get(ending_folded(wanted.name), wanted.name))


@dataclass
class Sidecars:
    """What the files beside one picture say."""

    captions: list[Caption] = field(default_factory=list)
    licence: str | None = None
    repeats: int = 1
    warnings: list[str] = field(default_factory=list)


class FolderCaptions:
    """The caption files of one folder, found by NFC-normalised name and any case of the ending. `names` are the folder's files."""

    def __init__(self, folder: Path, names: Iterable[str], model_written: dict[str, tuple[str, str]]):
        self.folder, self.model_written = folder, model_written
        self.by_name: dict[str, list[str]] = {}
        for name in sorted(names):
            self.by_name.setdefault(ending_folded(name), []).append(name)
        self.used: set[str] = set()

    def of(self, picture: str) -> Sidecars:
        """Captions of the picture with this file name, in order of precedence: .txt, .caption, full-name .txt, .json."""
        found = Sidecars()
        stem, full = (unicodedata.normalize("NFC", n) for n in (os.path.splitext(picture)[0], picture))
        plain = [self._plain(name, found) for name in (f"{stem}.txt", f"{stem}.caption", f"{full}.txt", f"{full}.caption")]
        texts = [caption for caption in plain if caption]
        if len({caption.text for caption in texts}) > 1:
            found.warnings.append("several caption files that differ; the first of .txt, .caption, full-name .txt is used")
        found.captions += texts[:1]
        for language in ("en", "zh"):
            caption = self._plain(f"{stem}.{language}.txt", found)
            if caption:
                found.captions.append(Caption(caption.text, language, "plain", caption.source))
        self._json(f"{stem}.json", found)
        self._thinking(f"{full}{THINKING_SUFFIX}", found)
        self._thinking(f"{stem}{THINKING_SUFFIX}", found)
        return found

    def _actual(self, name: str) -> str | None:
        """The file that is meant by a name. Raises DataError where two differ by the case of their ending alone."""
        names = self.by_name.get(ending_folded(name), [])
        other = next((each for each in names if unicodedata.normalize("NFC", each) != unicodedata.normalize("NFC", names[0])), None)
        if other is not None:
            raise DataError(f"{shown_name(names[0])} and {shown_name(other)} differ by the case of their ending alone, and only one can be the picture's",
                            where=shown_name(self.folder), fix="keep one of the two")
        return names[0] if names else None

    def _text(self, name: str, found: Sidecars) -> str | None:
        actual = self._actual(name)
        if actual is None:
            return None
        self.used.add(actual)
        try:
            return read_text(self.folder / actual)
        except (DataError, OSError) as error:
            reason = error.what if isinstance(error, DataError) else str(error.strerror)
            found.warnings.append(f"caption file {shown_name(actual)} cannot be read: {reason}")
            return None

    def _plain(self, name: str, found: Sidecars) -> Caption | None:
        text = self._text(name, found)
        line = clean_line(text) if text is not None else ""
        if text is not None and not line:
            found.warnings.append(f"caption file {shown_name(name)} is empty")
        if len(line) > LONG_CAPTION:
            found.warnings.append(f"a caption of {len(line):,} characters; text encoders read a few hundred words at most")
        written, writer = self.model_written.get(self._actual(name) or name, ("", ""))
        source = writer if line and written == line else "person"
        return Caption.written(line, source) if line else None

    def _json(self, name: str, found: Sidecars) -> None:
        text = self._text(name, found)
        if text is None:
            return
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            found.warnings.append(f"{shown_name(name)} is not valid JSON")
            return
        if not isinstance(data, dict):
            return
        captions = caption_of(data.get("captions"))
        if not captions and isinstance(data.get("tags"), list):
            captions = caption_of(", ".join(str(tag) for tag in data["tags"]))
        captions = caption_of(data.get("caption")) + captions
        if isinstance(data.get("licence", data.get("license")), str):
            found.licence = data.get("licence", data.get("license"))
        if isinstance(data.get("repeats"), int) and 1 <= data["repeats"] <= 100_000:
            found.repeats = data["repeats"]
        merge_captions(found.captions, captions)

    def _thinking(self, name: str, found: Sidecars) -> None:
        text = self._text(name, found)
        if text is None:
            return
        try:
            record = thinking_from_json(json.loads(text))
        except (ValueError, RecursionError, DataError) as error:
            reason = error.what if isinstance(error, DataError) else "not JSON"
            found.warnings.append(f"{shown_name(name)} is ignored: {reason}")
            return
        merge_captions(found.captions, [Caption(json.dumps(record.to_json(), ensure_ascii=False), record.language, "thinking", "model")])

    def orphans(self) -> list[str]:
        """Caption files that no picture claimed."""
        return sorted(n for names in self.by_name.values() for n in names if n not in self.used and n.lower().endswith(CAPTION_SUFFIXES))


def merge_captions(known: list[Caption], more: Iterable[Caption]) -> None:
    """Add captions to `known`; one with the same text and kind takes over what the better described one says."""
    for caption in more:
        same = next((i for i, c in enumerate(known) if (c.text, c.kind) == (caption.text, caption.kind)), None)
        if same is None:
            known.append(caption)
        else:
            known[same] = caption
