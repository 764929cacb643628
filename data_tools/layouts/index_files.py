"""Rows that name pictures: metadata.jsonl/.csv/.parquet of image folders, and any jsonl, csv or parquet with paths."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import DataError
from data_tools.layouts.caption_files import caption_of, merge_captions, read_text
from data_tools.near_names import meant_path
from data_tools.records import Caption, Entry, LeftOut, Reading, shown_name

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PATH_COLUMNS = ("file_name", "image_path", "img_path", "image", "path", "file", "filename")
TEXT_COLUMNS = ("text", "caption", "prompt", "text_en", "text_zh", "additional_feature", "captions")
MASK_COLUMNS = ("mask_file_name", "mask_path", "mask")
LARGEST_INDEX = 2**30  # bytes
TENCENT_CSV_FOLDER = "csvfile"


@dataclass(frozen=True)
class Row:
    """One row: the picture's path, resolved; what the row says; `where` for messages ("metadata.jsonl:3")."""

    path: Path
    captions: tuple[Caption, ...]
    where: str
    mask: Path | None = None
    licence: str | None = None
    repeats: int = 1
    split: str | None = None


def read_rows(index: Path, reading: Reading, *, image_root: Path | None = None) -> list[Row]:
    """Rows of one index file. A row that cannot be used is listed in `reading.left_out`.

    Paths are taken relative to the index file, then to `image_root`. Raises DataError when the file as a whole is unusable.
    """
    rows = []
    for where, values in _values(index, reading):
        try:
            rows.append(_row(values, where, index.parent, image_root))
        except DataError as error:
            reading.left_out.append(LeftOut(index.parent / f"{index.name}#{where.rsplit(':', 1)[-1]}", f"{where}: {error.what}", "bad_row"))
    return rows


def _row(values: dict, where: str, folder: Path, image_root: Path | None) -> Row:
    column = next((name for name in PATH_COLUMNS if isinstance(values.get(name), str) and values[name]), None)
    if column is None:
        raise DataError(f"names no picture (columns: {', '.join(map(str, list(values)[:12])) or 'none'}); expected one of {', '.join(PATH_COLUMNS)}")
    path = resolve(values[column], folder, image_root)
    mask = next((resolve(values[name], folder, image_root) for name in MASK_COLUMNS if isinstance(values.get(name), str) and values[name]), None)
    captions: list[Caption] = []
    for name in TEXT_COLUMNS:
        merge_captions(captions, caption_of(values.get(name)))
    licence = values.get("licence", values.get("license"))
    split = values.get("split")
    return Row(path, tuple(captions), where, mask, licence if isinstance(licence, str) and licence else None, _repeats(values.get("repeats", 1)), split if split in ("train", "held_out", "regularisation") else None)


def rows_of_mapping(data: object, index: Path, folder: Path) -> dict[Path, Row]:
    """kohya's metadata JSON: path or stem -> {"caption": ..., "tags": ...}; keys are paths below `folder`."""
    if not isinstance(data, dict):
        raise DataError("not a JSON object of pictures", where=shown_name(index))
    rows = {}
    for name, about in data.items():
        values = about if isinstance(about, dict) else {}
        captions = caption_of(values.get("caption")) or caption_of(values.get("tags"))
        path = Path(name)
        path = path if path.is_absolute() else folder / path
        rows[path] = Row(path, tuple(captions), f"{index.name}:{name}")
    return rows


def _repeats(value: object) -> int:
    try:
        repeats = int(str(value or 1))
    except ValueError:
        raise DataError(f"repeats is {value!r}, not a whole number") from None
    if not 1 <= repeats <= 100_000:
        raise DataError(f"repeats is {repeats}, not in 1..100000")
    return repeats


def resolve(name: str, folder: Path, image_root: Path | None = None) -> Path:
    """A picture named in a file: relative to the file's folder or to `image_root`, and inside it.

    Raises DataError for addresses, absolute paths and `..` that lead out of the folder.
    """
    if "\x00" in name or "://" in name:
        raise DataError(f"{shown_name(name)!r} is not a path of a picture")
    relative = Path(name.replace("\\", "/"))
    roots = [folder] + ([image_root] if image_root else [])
    if relative.is_absolute():
        if any(relative.is_relative_to(root.absolute()) for root in roots):
            return relative
        raise DataError(f"{shown_name(name)} is an absolute path outside the folder", fix="pass its folder as --image-root")
    depth = 0
    for part in relative.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            raise DataError(f"{shown_name(name)} leads out of the folder")
    found = [root / relative for root in roots]
    if folder.name == TENCENT_CSV_FOLDER:  # its paths start where the tool ran, above the data set's own folder
        found += [folder.parent.joinpath(*relative.parts[start:]) for start in range(len(relative.parts))]
    return next((path for path in found if path.exists()), found[0])


def _values(index: Path, reading: Reading) -> Iterator[tuple[str, dict]]:
    suffix = index.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(index)
    elif suffix == ".csv":
        yield from _csv(index, reading)
    else:
        yield from _jsonl(index, reading)


def _text(index: Path) -> str:
    try:
        return read_text(index, largest=LARGEST_INDEX)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=shown_name(index), fix=meant_path(index, "check its name and permissions")) from None


def _jsonl(index: Path, reading: Reading) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_text(index).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{index.name}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            reading.left_out.append(LeftOut(index.parent / f"{index.name}#{number}", f"{where}: not a JSON object", "bad_row"))
            continue
        yield where, values


def _csv(index: Path, reading: Reading) -> Iterator[tuple[str, dict]]:
    rows = csv.DictReader(io.StringIO(_text(index), newline=""))
    try:
        for values in rows:
            where = f"{index.name}:{rows.line_num}"
            if any(values.pop(None, [])):  # what follows the last comma would be lost
                reading.left_out.append(LeftOut(index.parent / f"{index.name}#{rows.line_num}", f"{where}: more cells than the header has columns; a caption with commas must stand in quotes", "bad_row"))
            else:
                yield where, values
    except csv.Error as error:
        raise DataError(f"not readable as CSV: {error}", where=f"{shown_name(index)}:{rows.line_num}") from None


def _parquet(index: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(index)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield f"{index.name}:{number}", values
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not readable as Parquet: {str(error).splitlines()[0]}", where=shown_name(index)) from None


def read_index_file(index: Path, image_root: Path | None = None) -> Reading:
    """A jsonl, csv or Parquet file whose rows are the set; pictures it does not name are not looked at."""
    reading = Reading("index")
    rows = read_rows(index, reading, image_root=image_root)
    for row in rows:
        if row.path.exists():
            reading.entries.append(Entry(row.path, row.captions, row.mask, row.licence, "index", row.repeats, row.split or "train"))
        else:
            reading.left_out.append(LeftOut(row.path, f"named in {row.where} but there is no such file", "missing"))
    reading.notes.append(f"layout: index ({shown_name(index.name)}, {len(rows)} rows name pictures)")
    return reading
