"""Arguments that the data verbs share, and how they become a scan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from data_tools.images import Limits
    from data_tools.progress import Progress
    from data_tools.scan import ScanReport

Source = Annotated[str, typer.Argument(metavar="FOLDER", help="A folder of pictures, or a file that names or holds them (.jsonl .csv .parquet .toml .json .tar .zip .arrow), or a Hub dataset.")]
Layout = Annotated[str, typer.Option("--layout", help="auto, folder, zip, webdataset, index, tencent-arrow, kohya-toml, onetrainer or datasets.")]
ImageRoot = Annotated[Path | None, typer.Option("--image-root", help="Where paths in an index file start, if not beside it.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, max=64, help="Decoding processes. Default: one a core.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Look at every picture again instead of using what is known of unchanged files.")]
MOST_LINES = 40  # pictures listed by name on a terminal; --json lists all


def limits_of(**values: Any) -> Limits:
    """Limits with these values, the usual ones for the rest."""
    from data_tools.images import Limits

    return Limits(**values)


def scanned(source: str, layout: str, image_root: Path | None, workers: int | None, fresh: bool, progress: Progress, limits: Limits | None = None) -> ScanReport:
    """Scan what the user named."""
    from data_tools.images import Limits
    from data_tools.scan import scan_folder

    return scan_folder(source, limits=limits or Limits(), workers=workers, progress=progress, layout=layout, image_root=image_root, use_cache=not fresh)


def source_folder(source: str) -> Path:
    """The folder that names are shown relative to."""
    path = Path(source)
    return path if path.is_dir() or not path.exists() else path.parent


def print_scan(found: ScanReport, source: str, notes_said: bool) -> tuple[dict[str, Any], list[str]]:
    """A scan as data and as lines. notes_said: whether the scan's progress has told how the folder was understood."""
    from data_tools.records import shown_name

    warned = [(record, text) for record in found.records for text in record.warnings]
    data = {
        "found": found.found, "usable": len(found.records), "left_out": [{"path": str(i.path), "reason": i.reason, "code": i.code} for i in found.left_out], "layout": found.layout, "notes": found.notes,
        "warnings": found.warnings + [f"{record.path}: {text}" for record, text in warned], "captioned": sum(record.caption is not None for record in found.records), "reused": found.reused,
        "other_files": [str(path) for path in found.other_files],
    }
    lines = [*([] if notes_said else found.notes), *(f"warning: {text}" for text in found.warnings)]
    lines += _some([f"warning: {shown_name(record.path)}: {text}" for record, text in warned])
    lines += _some([f"left out: {shown_name(item.path)}: {item.reason}" for item in found.left_out])
    known = f", {found.reused} known from an earlier scan" if found.reused else ""
    lines.append(f"{found.found} pictures found, {len(found.records)} usable, {len(found.left_out)} left out{known}; {data['captioned']} have a caption")
    if found.other_files:
        lines.append(f"{len(found.other_files)} other files are no pictures")
    return data, lines


def _some(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], f"... and {len(lines) - MOST_LINES} more; --json lists all"]
