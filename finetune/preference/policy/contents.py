"""What the files hold that a preference run was started with: a run that goes on must meet the same start and the same rewards."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.errors import BadInput
from data_tools.near_names import meant_path
from finetune.adapters.strict_reading import identity_of
from finetune.preference.policy.settings import PreferenceSettings, dump_settings
from finetune.preference.rewards.ready_made import ready_made
from finetune.preference.rewards.references import json_of, part_place, read_description, weighted_terms


def contents(settings: PreferenceSettings) -> dict[str, str]:
    """SHA-256, hex, of what `start`, `reward` and `witness` lead to, for those that are files; models that a reward names are known by
    their names. Raises BadInput where one cannot be read."""
    found = {}
    if settings.start:
        try:
            found["start"] = identity_of(Path(settings.start))
        except OSError:
            raise BadInput("the adapter to start from cannot be read", where=settings.start, fix=meant_path(settings.start, "put it back, or start a new run with --out")) from None
    for name in ("reward", "witness"):
        digests = sorted(_digest(reference) for reference in _files(getattr(settings, name)))
        if digests:
            found[name] = hashlib.sha256("".join(digests).encode()).hexdigest()
    return found


def _files(reference: str | Path | None) -> Iterator[Path]:
    """Every reward file that a reference leads to, those that a sum names among them."""
    terms = weighted_terms(str(reference)) if reference is not None else []
    if terms is not None:
        for _, term in terms:
            yield from _files(term)
        return
    if str(reference).startswith("measure:") or ready_made(str(reference)) is not None:
        return
    path = json_of(Path(reference))
    yield path
    description = read_description(path)
    for part in description.get("parts") or () if description["kind"] == "sum" else ():
        if isinstance(part, Mapping) and isinstance(part.get("reward"), str):
            yield from _files(part_place(path, part["reward"]))


def _digest(path: Path) -> str:
    # The numbers of a preference head are named in its description by their hash.
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dump_started(settings: PreferenceSettings) -> str:
    """TOML of the settings and, in a table of its own, of what their files hold."""
    lines = [f'{name} = "{digest}"' for name, digest in contents(settings).items()]
    return dump_settings(settings) + ("\n[content]\n" + "\n".join(lines) + "\n" if lines else "")


def changed_contents(settings: PreferenceSettings, file: Path) -> list[str]:
    """Which of the files hold something else than when `file` was written, by the place the settings name. Empty for runs that
    did not write it down."""
    written: Any = tomllib.loads(file.read_text(encoding="utf-8")).get("content", {})
    now = contents(settings)
    return [f"{name} {getattr(settings, name)}" for name, digest in now.items() if written.get(name, digest) != digest]
