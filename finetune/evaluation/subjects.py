"""Who is compared: the bare base, and adapter files with a strength, each known by the hash of what decides its effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.near_names import meant_path
from finetune.errors import BadInput

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile

BASE = "base"


@dataclass(frozen=True)
class Subject:
    """name: unique in a comparison; "base" is the bare base.  path: of the adapter file.  sha256: `strict_reading.identity_of` it. None for the base."""

    name: str
    path: Path | None = None
    sha256: str | None = None
    weight: float = 1.0

    @property
    def folder(self) -> str:
        """Name of its picture folder: another file or strength is another folder."""
        return BASE if self.sha256 is None else f"{self.name}-{self.sha256[:8]}-{self.weight:g}"

    def load(self) -> AdapterFile:
        """The adapter, canonical. Raises AdapterError."""
        from finetune.adapters.adapter_file import read_adapter
        from finetune.families.key_layouts import KEY_MAPS

        return read_adapter(self.path, KEY_MAPS)


def split_weight(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT as the command takes it. Raises BadInput for a weight that is no number."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in weight or not weight:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise BadInput(f"{weight!r} is not a strength", where=text, fix="write FILE:0.8") from None


def subjects_of(adapters: Sequence[str]) -> list[Subject]:
    """The base first, then each adapter under a name of its own. Raises AdapterError or BadInput for what is not there."""
    from finetune.adapters.strict_reading import identity_of, locate

    found = [Subject(BASE)]
    for text in adapters:
        path, weight = split_weight(text)
        file = locate(path)
        if not file.is_file():
            raise BadInput("there is no such adapter", where=str(path), fix=meant_path(path, "give an adapter file, or the `adapter` folder of a run"))
        stem = _name(file, path)
        taken = {subject.name for subject in found}
        name = next(candidate for number in range(1, len(adapters) + 2) if (candidate := stem if number == 1 else f"{stem}-{number}") not in taken)
        found.append(Subject(name, file, identity_of(file), weight))
    return found


def _name(file: Path, given: Path) -> str:
    """A run's folder for `runs/x/adapter`, else the folder or file name."""
    parts = [part for part in (given.resolve().parent.name if given.name == "adapter" else "", given.name if given.is_dir() else file.stem) if part]
    text = "".join(character if character.isalnum() or character in "-_" else "-" for character in parts[0])[:40].strip("-")
    return text if text and text != BASE else "adapter"
