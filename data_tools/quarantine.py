"""Move pictures aside, with their caption files, to a place from which they can be brought back. Nothing is deleted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from data_tools.errors import DataError
from data_tools.images import EXTENSIONS
from data_tools.layouts.caption_files import FilesBeside
from data_tools.layouts.picture_folder import MASK_FOLDERS, MASK_STEM_SUFFIXES
from data_tools.picture_folder_guard import require_outside
from data_tools.records import LeftOut, shown_name

LOG_NAME = "moved.jsonl"
BESIDE = (".txt", ".caption", ".json", ".en.txt", ".zh.txt", ".thinking.json")


def move_aside(items: Iterable[LeftOut], folder: Path, quarantine: Path) -> list[tuple[Path, Path]]:
    """Move each file that exists under `folder` to the same place under `quarantine`; return (from, to) of the pictures.

    Caption files and masks that no other picture shares go along. Every move is written to `moved.jsonl` before it is made.
    Raises DataError when the quarantine lies inside the folder, or a name is taken there.
    """
    require_outside(quarantine, folder, "the quarantine")
    folder, quarantine = folder.absolute(), quarantine.absolute()
    moved = []
    for item in items:
        source = item.path.absolute()
        if not source.is_relative_to(folder) or not os.path.lexists(source):
            continue
        for path in [source, *_beside(source)]:
            target = quarantine / path.relative_to(folder)
            _move(path, target, quarantine, item.reason)
            if path == source:
                moved.append((path, target))
    return moved


def _beside(picture: Path) -> list[Path]:
    others = [p for p in picture.parent.iterdir() if p.stem == picture.stem and p != picture and p.suffix.lower() not in (".txt", ".caption", ".json")]
    if others:
        return []
    names = [picture.with_name(picture.stem + suffix) for suffix in BESIDE] + [picture.with_name(picture.name + suffix) for suffix in (".txt", ".thinking.json")]
    files = FilesBeside()
    return [path for path in dict.fromkeys(map(files.there, names)) if path.is_file()] + _masks_of(picture)


def _masks_of(picture: Path) -> list[Path]:
    """A mask that stays behind would be taken for a picture."""
    stems = {picture.stem + suffix for suffix in MASK_STEM_SUFFIXES}
    places = [(picture.parent, stems), *((picture.parent / name, {picture.stem}) for name in MASK_FOLDERS)]
    return [path for folder, names in places if folder.is_dir() for path in sorted(folder.iterdir()) if path.stem in names and path.suffix.lower() in EXTENSIONS]


def _move(source: Path, target: Path, quarantine: Path, reason: str) -> None:
    if os.path.lexists(target):
        raise DataError("a file of this name was moved there before", where=shown_name(target), fix="name another quarantine folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    entry = {"from": os.fsencode(source).decode("utf-8", "surrogateescape"), "to": os.fsencode(target).decode("utf-8", "surrogateescape"), "reason": reason}
    with open(quarantine / LOG_NAME, "a", encoding="utf-8") as log:
        log.write(json.dumps(entry) + "\n")
    try:
        os.rename(source, target)
    except OSError as error:
        raise DataError(f"cannot be moved: {error.strerror}", where=shown_name(source), fix="the quarantine must be on the same disk and both folders writable") from None


def bring_back(quarantine: Path) -> list[Path]:
    """Undo every move that the quarantine's log names and whose file is still there; return the paths restored."""
    log = quarantine / LOG_NAME
    if not log.is_file():
        raise DataError("no log of moves", where=shown_name(log))
    restored = []
    for line in reversed(log.read_text(encoding="utf-8").splitlines()):
        entry = json.loads(line)
        source, target = Path(entry["from"]), Path(entry["to"])
        if os.path.lexists(target) and not os.path.lexists(source):
            source.parent.mkdir(parents=True, exist_ok=True)
            os.rename(target, source)
            restored.append(source)
    log.rename(log.with_name(f"{LOG_NAME}.undone-{len(list(quarantine.glob(LOG_NAME + '.undone-*'))) + 1}"))
    return restored
