"""Look at every picture of a folder: open it fully in another process, hash it, and account for each one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.cached_tasks import cached_results
from data_tools.errors import DataError
from data_tools.images import Limits
from data_tools.layouts.detect import read_layout
from data_tools.progress import Progress
from data_tools.records import Entry, ImageRecord, LeftOut, Reading, shown_name


@dataclass
class ScanReport:
    """Every picture found is either in `records` or in `left_out`: found == len(records) + len(left_out), always.

    notes: how the folder was understood.  warnings: about the folder; those about one picture are in its record.
    other_files: files that are no pictures.  reused: pictures whose result came from the result cache.
    """

    layout: str
    records: list[ImageRecord] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    other_files: list[Path] = field(default_factory=list)
    reused: int = 0

    @property
    def found(self) -> int:
        """Pictures seen, usable or not."""
        return len(self.records) + len(self.left_out)

    def reasons(self) -> dict[str, int]:
        """How many pictures were left out for each kind of reason, most first."""
        return dict(Counter(item.code for item in self.left_out).most_common())


def scan_folder(
    folder: Path | str,
    *,
    limits: Limits = Limits(),
    workers: int | None = None,
    progress: Progress = Progress(),
    layout: str = "auto",
    image_root: Path | None = None,
    use_cache: bool = True,
    cache: Path | None = None,
) -> ScanReport:
    """Read a folder or file of any known layout and check every picture of it.

    workers: decoding processes, None = one per core.  layout: a name of `layouts.detect.LAYOUTS` or "auto".
    use_cache: take results of unchanged files from the result cache (in `cache`, None = the user's cache folder).
    Raises DataError when the folder or the file that describes it cannot be read at all.
    """
    reading = read_layout(Path(folder), layout=layout, image_root=image_root, progress=progress)
    return check_reading(reading, limits=limits, workers=workers, progress=progress, use_cache=use_cache, cache=cache)


def check_reading(
    reading: Reading, *, limits: Limits = Limits(), workers: int | None = None, progress: Progress = Progress(), use_cache: bool = True, cache: Path | None = None
) -> ScanReport:
    """Open every entry of a reading in worker processes; entries keep their order."""
    for note in reading.notes:
        progress.say(note)
    report = ScanReport(reading.layout, left_out=list(reading.left_out), warnings=list(reading.warnings), notes=list(reading.notes), other_files=list(reading.other_files))
    jobs = [(entry.path, entry.mask) for entry in reading.entries]
    results, report.reused = cached_results(jobs, "check", limits=limits, workers=workers, progress=progress, use_cache=use_cache, cache=cache)
    results.reverse()
    for entry in reading.entries:
        result = results.pop()  # let go of one by one: a record says the same in less memory
        if "code" in result:
            report.left_out.append(LeftOut(entry.path, result["reason"], result["code"]))
        else:
            report.records.append(_record(entry, result))
    return report


def _record(entry: Entry, result: dict) -> ImageRecord:
    warnings = (*entry.warnings, *result["warnings"])
    mask = None if any(text.startswith("the mask cannot be used") for text in result["warnings"]) else entry.mask
    return ImageRecord(entry.path, result["width"], result["height"], result["hash"], entry.captions, mask, entry.licence, entry.layout, entry.repeats, entry.split, warnings)


def require_usable(report: ScanReport, folder: Path | str) -> None:
    """Raise DataError with the counts by reason when no picture is left."""
    if report.records:
        return
    counts = ", ".join(f"{count} {code}" for code, count in report.reasons().items()) or "no picture found"
    raise DataError(f"no usable picture ({counts})", where=shown_name(folder), fix="run `brushwork data scan` on the folder to see each one")


