"""Edit many captions by rules: seen before it is done (dry run), undone after it was (undo).

Rules work on the parts of a caption between commas. They are applied in the order given, to caption files (.txt, .caption) only.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.atomic_files import write_text
from data_tools.captions import require_beside
from data_tools.errors import DataError
from data_tools.layouts.caption_files import FilesBeside, clean_line, read_text
from data_tools.layouts.caption_log import LOG_FOLDER, append_to_log, model_written_captions
from data_tools.records import ImageRecord, best_caption, language_of, shown_name

UNDO_FOLDER = "edits"
SEPARATOR = re.compile(r"\s*[,，、]\s*")
LONGEST_PATTERN = 1000  # characters

Rule = Callable[[str, str], str]  # (caption, key of the picture) -> caption


@dataclass(frozen=True)
class Change:
    """One caption file before and after."""

    path: Path
    before: str
    after: str


def parts_of(text: str) -> list[str]:
    """The parts between commas, without empty ones."""
    return [part for part in SEPARATOR.split(text) if part]


def _joined(parts: Sequence[str]) -> str:
    return ("，" if language_of("".join(parts)) == "zh" else ", ").join(parts)


def prepend(words: str) -> Rule:
    """Put words before the caption unless it begins with them."""
    return lambda text, key: text if text.startswith(words) else words + text


def append(words: str) -> Rule:
    """Put words after the caption unless it ends with them."""
    return lambda text, key: text if text.endswith(words) else text + words


def replace(pattern: str, new: str, *, regex: bool = False) -> Rule:
    """Replace a text, or a regular expression, everywhere. Raises DataError for a broken expression."""
    if not pattern or len(pattern) > LONGEST_PATTERN:
        raise DataError(f"a text to replace has 1 to {LONGEST_PATTERN} characters")
    if not regex:
        return lambda text, key: text.replace(pattern, new)
    try:
        compiled = re.compile(pattern)
        compiled.sub(new, "")
    except (re.error, IndexError) as error:
        raise DataError(f"not a regular expression: {error}", where=pattern) from None
    return lambda text, key: compiled.sub(new, text)


def drop_parts(names: Sequence[str]) -> Rule:
    """Remove parts (tags) that equal one of these names, ignoring case."""
    unwanted = {name.strip().casefold() for name in names}

    def rule(text: str, key: str) -> str:
        parts = parts_of(text)
        kept = [part for part in parts if part.strip(" .。").casefold() not in unwanted]
        return text if len(kept) == len(parts) else _joined(kept)

    return rule


def shuffle(keep: int = 0, seed: int = 0) -> Rule:
    """Shuffle the parts but the first `keep`; the order depends on the seed and the file alone."""

    def rule(text: str, key: str) -> str:
        parts = parts_of(text)
        rest = parts[keep:]
        random.Random(hashlib.sha256(f"{seed}|{key}".encode("utf-8", "surrogateescape")).digest()).shuffle(rest)
        return _joined(parts[:keep] + rest)

    return rule


def keep_first(count: int) -> Rule:
    """Keep the first `count` parts."""

    def rule(text: str, key: str) -> str:
        parts = parts_of(text)
        return text if len(parts) <= count else _joined(parts[:count])

    return rule


def plan_edits(records: Sequence[ImageRecord], rules: Sequence[Rule]) -> list[Change]:
    """What the rules would change, without changing anything. Raises DataError for sets without caption files."""
    require_beside(records, overwriting=True)
    changes, seen, files = [], set(), FilesBeside()
    for record in records:
        if best_caption(record.captions) is None:
            continue
        path = _caption_file(record, files)
        before = "" if path is None else clean_line(read_text(path))
        if not before or path in seen:
            continue
        seen.add(path)
        after = before
        for rule in rules:
            after = clean_line(rule(after, record.path.name))
        if after != before:
            changes.append(Change(path, before, after))
    return changes


def not_in_files(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """The pictures whose captions no rule reaches, since they stand elsewhere: in a .json, in `<stem>.zh.txt`, in the folder's name."""
    files = FilesBeside()
    return [record for record in records if record.caption and ((path := _caption_file(record, files)) is None or not clean_line(read_text(path)))]


def _caption_file(record: ImageRecord, files: FilesBeside) -> Path | None:
    stem, full = record.path.stem, record.path.name
    names = [f"{stem}.txt", f"{stem}.caption", f"{full}.txt", f"{full}.caption"]
    return next((path for name in names if (path := files.there(record.path.with_name(name))).is_file()), None)


def apply_edits(changes: Sequence[Change], folder: Path) -> Path:
    """Write the changes. First all of them go into `<folder>/.brushwork/edits/NNNN.json`, which `undo` reads; returns it."""
    undo_folder = folder / LOG_FOLDER / UNDO_FOLDER
    undo_folder.mkdir(parents=True, exist_ok=True)
    record = undo_folder / f"{len(list(undo_folder.glob('*.json*'))) + 1:04d}.json"
    entries = [{"file": str(change.path.relative_to(folder)), "before": change.before, "after": change.after, "content": read_text(change.path)} for change in changes]
    write_text(record, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
    for change in changes:
        _write(change.path, change.before, change.after, change.after + "\n")
    return record


def _write(path: Path, before: str, after: str, content: str) -> None:
    """A model's caption that is edited by rule stays a model's: the log follows. content: of the file that says `after`."""
    if model_written_captions(path.parent).get(path.name, ("", ""))[0] == before:
        append_to_log(path.parent, {"file": path.name, "text": after, "by": "edit"})
    write_text(path, content)


def undo(folder: Path) -> tuple[list[Path], list[Path]]:
    """Take back the last edit: (files restored, files left because somebody changed them since). Raises DataError without one."""
    undo_folder = folder / LOG_FOLDER / UNDO_FOLDER
    records = sorted(undo_folder.glob("*.json")) if undo_folder.is_dir() else []
    if not records:
        raise DataError("there is no edit to undo", where=shown_name(folder))
    restored, left = [], []
    for entry in json.loads(records[-1].read_text(encoding="utf-8")):
        path = folder / entry["file"]
        if path.is_file() and clean_line(read_text(path)) == entry["after"]:
            # An edit makes one line of a caption; taking it back gives the lines back too (records of earlier versions lack them).
            _write(path, entry["after"], entry["before"], entry.get("content", entry["before"] + "\n"))
            restored.append(path)
        else:
            left.append(path)
    records[-1].rename(records[-1].with_suffix(".json.undone"))
    return restored, left
