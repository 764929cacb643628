"""The folders that a run's pictures come from, and how much each counts: the main one, further ones, regularisation pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.picture_folder_guard import require_outside
from data_tools.progress import Progress
from data_tools.records import ImageRecord, shown_name
from data_tools.scan import LeftOut, ScanReport, scan_folder
from finetune.errors import DataError
from finetune.recipe import Recipe

NAMED_IN_A_MESSAGE = 5


@dataclass(frozen=True)
class Source:
    """One folder. repeats: times that its pictures are seen while one of the main folder is seen once.  weight: factor on
    their loss.  regularisation: pictures of what the base knows already."""

    folder: Path
    repeats: int = 1
    weight: float = 1.0
    regularisation: bool = False


@dataclass(frozen=True)
class SourcePicture:
    """A picture and how much it counts. repeats: those of the folder times those of the picture's own layout (kohya's
    `10_name` folders, a column of a metadata file)."""

    record: ImageRecord
    folder: Path
    repeats: int
    weight: float
    regularisation: bool


@dataclass
class FoundPictures:
    """What all folders hold: own pictures first, then regularisation pictures. layout: of the main folder."""

    pictures: list[SourcePicture] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layout: str = ""


class FolderScans:
    """What was found in each folder, which is looked at once: before anything heavy is imported, if that can be, and not again for the
    run that follows."""

    def __init__(self) -> None:
        self._found: dict[Path, ScanReport] = {}

    def of(self, folder: Path, progress: Progress) -> ScanReport:
        """The folder's scan. Raises DataError when it cannot be read."""
        if folder not in self._found:
            self._found[folder] = scan_folder(folder, progress=progress)
        return self._found[folder]


def sources_of(recipe: Recipe, drawn: Path | None = None) -> list[Source]:
    """The folders of a recipe in their order. drawn: where regularisation pictures were drawn by the base."""
    data = recipe.data
    if data.folder is None:
        raise DataError("no picture folder is named", where="data.folder", fix="give a folder on the command line or in the recipe")
    found = [Source(Path(data.folder))] + [Source(Path(entry.folder), entry.repeats, entry.weight) for entry in data.also]
    regularisation = drawn if data.regularisation_folder is None else Path(data.regularisation_folder)
    return found + ([Source(regularisation, weight=data.regularisation_weight, regularisation=True)] if regularisation is not None else [])


def require_run_outside(run: Path, recipe: Recipe) -> None:
    """Raise DataError for a run folder inside one of the picture folders: its samples would be trained by the next run, and no run there
    could be resumed, since they change the data."""
    data = recipe.data
    for folder in (data.folder, *(entry.folder for entry in data.also), data.regularisation_folder, recipe.validation.folder):
        if folder is not None:
            require_outside(run, Path(folder), "the run folder", fix="choose another place with --out FOLDER")


def find_pictures(recipe: Recipe, drawn: Path | None, progress: Progress, scans: FolderScans) -> FoundPictures:
    """Look at every folder. Raises DataError when one of them has no usable picture.

    A picture that lies in two of them belongs to the one that is named last: that is how a folder inside the main one
    is given a weight of its own. It keeps the repeats that the scan of the main one read off its name (10_dog).
    """
    found, by_source, named_repeats = FoundPictures(), [], {}
    for source in sources_of(recipe, drawn):
        report = scans.of(source.folder, progress)
        _require_usable(report, source.folder)
        found.layout = found.layout or report.layout
        said = report.warnings + [f"{shown_name(record.path)}: {text}" for record in report.records for text in record.warnings]
        found.warnings += [text for text in said if text not in found.warnings]
        found.left_out += [left for left in report.left_out if left.path not in {known.path for known in found.left_out}]
        by_source.append(list(_counted(source, report, recipe, named_repeats)))
    for number, pictures in enumerate(by_source):
        later = {picture.record.path.resolve() for others in by_source[number + 1:] for picture in others}
        found.pictures += [picture for picture in pictures if not later or picture.record.path.resolve() not in later]
    # Stable: within their kind pictures keep the order of the folders.
    found.pictures.sort(key=lambda picture: picture.regularisation)
    if found.pictures[0].regularisation:
        raise DataError("there are only regularisation pictures, and nothing to learn", where=str(recipe.data.folder), fix="put pictures of what is new into the folder")
    return found


def _require_usable(report: ScanReport, folder: Path) -> None:
    if not report.records:
        reasons = "; ".join(f"{left.path.name}: {left.reason}" for left in report.left_out[:NAMED_IN_A_MESSAGE])
        raise DataError("there is no usable picture in the folder" + (f" ({reasons})" if reasons else ""), where=str(folder),
                        fix="put pictures (PNG, JPEG, WebP, AVIF ...) into it")


def _counted(source: Source, report: ScanReport, recipe: Recipe, named_repeats: dict[Path, int]) -> Iterator[SourcePicture]:
    """named_repeats: path -> the most that a scan has read of its picture so far; written to."""
    for record in report.records:
        path = record.path.resolve()
        named_repeats[path] = max(record.repeats, named_repeats.get(path, 1))
        regularisation = source.regularisation or record.split == "regularisation"
        weight = recipe.data.regularisation_weight if regularisation else source.weight
        yield SourcePicture(record, source.folder, named_repeats[path] * source.repeats, weight, regularisation)


def folder_rows(pictures: Sequence[SourcePicture]) -> Iterator[dict[str, Any]]:
    """One row for each folder and kind of picture, as plain values: how many it gave and how they count."""
    kinds = dict.fromkeys((picture.folder, picture.regularisation, picture.weight) for picture in pictures)
    for folder, regularisation, weight in kinds:
        alike = [picture for picture in pictures if (picture.folder, picture.regularisation, picture.weight) == (folder, regularisation, weight)]
        yield {"folder": str(folder), "regularisation": regularisation, "pictures": len(alike), "seen": sum(picture.repeats for picture in alike), "weight": weight}
