"""Write a checked set in a layout that another tool reads. The target appears whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.atomic_files import OUT_OF_SPACE, flush_folder
from data_tools.errors import BrushworkError, DataError
from data_tools.layouts import container_writers, writers
from data_tools.layouts.writers import Writer, named
from data_tools.progress import Progress
from data_tools.records import ImageRecord, shown_name

WRITERS: dict[str, Writer] = {
    "sidecars": writers.write_sidecars,
    "kohya": writers.write_kohya,
    "onetrainer": writers.write_onetrainer,
    "metadata": writers.write_metadata,
    "tencent-csv": writers.write_tencent_csv,
    "tencent-arrow": container_writers.write_tencent_arrow,
    "webdataset": container_writers.write_webdataset,
    "parquet": container_writers.write_parquet,
    "zip": container_writers.write_zip,
}
# The file inside the target that a reader is pointed at; the target itself where none is named.
OPENED_AT = {"onetrainer": "concepts.json", "tencent-csv": "csvfile/image_text.csv", "tencent-arrow": "jsons/pictures.json", "parquet": "train.parquet", "zip": "pictures.zip"}


@dataclass(frozen=True)
class Converted:
    """What was written. open_at: the path to hand to a reader.  lost: what the layout has no place for, in words."""

    folder: Path
    layout: str
    pictures: int
    open_at: Path
    lost: tuple[str, ...]


def convert(records: Sequence[ImageRecord], target: Path | str, to: str, *, progress: Progress = Progress()) -> Converted:
    """Write `records` to the folder `target` in layout `to` (a key of `WRITERS`), pictures byte for byte.

    Raises DataError when `target` exists and is not empty, when `to` is unknown, or when a picture changed under way.
    """
    target = Path(target)
    check_layout(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError("exists and is not an empty folder", where=shown_name(target), fix="name a new folder")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with progress.phase(f"writing {to}", len(records)) as advance:
            lost = WRITERS[to](named(records), partial, advance)
        partial.mkdir(exist_ok=True)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
        flush_folder(target.parent)
    except OSError as error:
        raise _refused(error, target, partial) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(target, to, len(records), target / OPENED_AT.get(to, "."), tuple(lost))


def check_layout(to: str) -> None:
    """Raises DataError for a layout that is not written."""
    if to not in WRITERS:
        raise DataError(f"unknown layout {to!r}", fix=f"one of {', '.join(WRITERS)}")


def _refused(error: OSError, target: Path, partial: Path) -> BrushworkError:
    """What the system's refusal means. A full disk is named by what was to be written, whatever file was being read for it.
    partial: where the set is while it is written, which the user does not know of."""
    at = target if error.filename is None or Path(error.filename).is_relative_to(partial) else Path(error.filename)
    reason = error.strerror or str(error)
    if error.errno in OUT_OF_SPACE or f"errno {errno.ENOSPC}" in reason:
        return BrushworkError(f"cannot write: {reason}", where=shown_name(target), fix="free some space or name another place; nothing of it was kept")
    return DataError(f"cannot write: {reason}", where=shown_name(at), fix="look whether the pictures are still there and may be read, or name another place")
