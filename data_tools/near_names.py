"""The name that somebody probably meant: of settings, of models, of files that lie where one was looked for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

MOST_NAMES = 10_000  # entries of a folder that are looked through


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known name most like `given`, whatever the case of its letters, or None when nothing is like it."""
    lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(given[:200].lower(), list(lower), n=1, cutoff=0.6)
    return lower[found[0]] if found else None


def nearest_path(missing: Path | str) -> Path | None:
    """What lies in the same folder under the name most like that of `missing`; None where there is no such folder or name, or it is there."""
    path = Path(missing)
    try:
        names = [entry.name for entry, _ in zip(path.parent.iterdir(), range(MOST_NAMES)) if not entry.name.startswith(".")]
    except (OSError, ValueError):
        return None
    found = None if path.name in names else _nearest_file(path.name, names)
    return path.with_name(found) if found else None


def _nearest_file(given: str, names: Iterable[str]) -> str | None:
    """What two names share by being of one kind makes them no more alike: cat.safetensors is not meant where dog.safetensors lies."""
    stem, ending = os.path.splitext(given)
    same = {name[: len(name) - len(ending)]: name for name in names if ending and name.lower().endswith(ending.lower())}
    found = nearest(stem, same)
    return same[found] if found else nearest(given, sorted(set(names).difference(same.values())))


def meant_path(missing: Path | str, otherwise: str) -> str:
    """A hint for a path that is not there: the near name beside it, or `otherwise`."""
    near = nearest_path(missing)
    return f"did you mean {near}?" if near else otherwise
