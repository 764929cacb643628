"""Where results may not go: into a picture folder, where the next scan would take them for pictures and captions."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import DataError
from data_tools.records import shown_name


def require_outside(place: Path, folder: Path, what: str, fix: str = "name a place beside it") -> None:
    """Raise DataError when `place` is the picture folder or lies inside it, by whatever links. what: names the result in the message."""
    if folder.is_dir() and place.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{what} must not lie inside the picture folder", where=shown_name(place), fix=fix)
