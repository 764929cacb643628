"""Which layout a folder or file has, and the reader for it. The decision is always said aloud in the reading's notes."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import DataError
from data_tools.layouts.picture_folder import read_picture_folder, require_folder
from data_tools.progress import Progress
from data_tools.records import Reading, shown_name

LAYOUTS = ("auto", "folder")


def read_layout(path: Path, *, layout: str = "auto", image_root: Path | None = None, progress: Progress = Progress()) -> Reading:
    """Read whatever `path` is, without opening pictures. Raises DataError when it is nothing we know."""
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}", fix=f"one of {', '.join(LAYOUTS)}")
    if not path.exists():
        raise DataError("there is no such folder or file", where=shown_name(path))
    require_folder(path)
    return read_picture_folder(path)
