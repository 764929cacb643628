"""HunyuanDiT's own form: Arrow files that hold the picture bytes, an index JSON (v2) over them, and the CSV they come from.

Column names and index keys follow HunyuanDiT's `csv2arrow.py` and IndexKits: `text_zh`, `text_en`, `md5`, `width`,
`height`, `image` (or `binary`). Indices are row numbers over all Arrow files, one after the other.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from data_tools.errors import DataError
from data_tools.layouts.caption_files import caption_of, merge_captions, read_text
from data_tools.layouts.unpacking import extension_of, keep_picture, unpacked_folder
from data_tools.near_names import meant_path
from data_tools.progress import Progress
from data_tools.records import Caption, Entry, LeftOut, Reading, shown_name

IMAGE_COLUMNS = ("image", "binary")
TEXT_COLUMNS = ("text_zh", "text_en")
LARGEST_INDEX = 2**30  # bytes


def is_index(data: object) -> bool:
    """Whether parsed JSON looks like an IndexKits index."""
    return isinstance(data, dict) and "arrow_files" in data and "indices" in data


def read_index(path: Path, progress: Progress = Progress()) -> Reading:
    """Read an index JSON: the rows it names, an index named twice being one picture seen twice."""
    data = load_json(path)
    files = [_locate(str(name), path) for name in data.get("arrow_files", [])]
    if not files:
        raise DataError("names no Arrow file", where=shown_name(path))
    times = Counter(_indices(data, path))
    reading = read_arrow(files, progress)
    reading.notes[0] = f"layout: tencent-arrow (index over {len(files)} Arrow file{'s' if len(files) != 1 else ''}, {len(times)} rows named)"
    return _only(reading, times, path)


def load_json(path: Path) -> dict:
    """A JSON file of any of these tools. Raises DataError when it is none."""
    try:
        return json.loads(read_text(path, largest=LARGEST_INDEX))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", where=shown_name(path)) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=shown_name(path), fix=meant_path(path, "check its name and permissions")) from None


def _locate(name: str, index: Path) -> Path:
    """Arrow files are written down relative to where the tool ran; look beside the index by ever fewer leading parts."""
    parts = Path(name).parts
    for base in (index.parent, index.parent.parent):
        for start in range(len(parts)):
            found = base.joinpath(*[p for p in parts[start:] if p not in ("/", "..")])
            if found.is_file():
                return found
    raise DataError(f"the Arrow file {shown_name(name)} is not there", where=shown_name(index))


def _indices(data: dict, path: Path) -> list[int]:
    indices = data["indices"]
    if data.get("indices_file"):
        import numpy as np

        try:
            with np.load(path.parent / Path(str(data["indices_file"])).name, allow_pickle=False) as arrays:
                return sorted(int(i) for name in arrays for i in arrays[name].ravel())
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"its indices file cannot be read: {error}", where=shown_name(path)) from None
    if isinstance(indices, dict):
        indices = [i for values in indices.values() for i in values]
    if not isinstance(indices, list) or not all(isinstance(i, int) and i >= 0 for i in indices):
        raise DataError("`indices` is not a list of row numbers", where=shown_name(path))
    return indices


def _only(reading: Reading, times: Counter, path: Path) -> Reading:
    rows = {int(str(entry.path.parent.name)): entry for entry in reading.entries}
    refused = {int(item.path.name.rpartition("#")[2]): item for item in reading.left_out}
    kept = [replace(rows[i], repeats=times[i]) for i in sorted(times) if i in rows]
    left = [refused[i] for i in sorted(times) if i in refused]
    left += [LeftOut(Path(f"{path}#{i}"), f"row {i} is named by the index but no Arrow file has it", "missing") for i in sorted(times) if i not in rows and i not in refused]
    unnamed = len(rows) - len(kept)
    if unnamed:
        reading.notes.append(f"{unnamed} rows of the Arrow files are not named by the index and not part of the set")
    reading.entries, reading.left_out = kept, left
    return reading


def read_arrow(files: list[Path], progress: Progress = Progress()) -> Reading:
    """Read Arrow files (IPC file or stream form) with picture bytes in a column `image` or `binary`."""
    reading = Reading("tencent-arrow")
    reading.notes.append(f"layout: tencent-arrow ({len(files)} Arrow file{'s' if len(files) != 1 else ''} that hold the pictures)")
    number = 0
    with progress.phase("reading Arrow files", len(files)) as advance:
        for file in files:
            number = _read_file(file, number, reading)
            advance(1, file.name)
    return reading


def _read_file(file: Path, number: int, reading: Reading) -> int:
    import pyarrow as pa

    folder = unpacked_folder(file)
    try:
        with pa.memory_map(str(file)) as source:
            for batch in _batches(source):
                column = next((name for name in IMAGE_COLUMNS if name in batch.schema.names), None)
                if column is None:
                    raise DataError(f"no column image or binary (columns: {', '.join(batch.schema.names)})", where=shown_name(file))
                for row in batch.to_pylist():
                    _add(row, column, number, file, folder, reading)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a readable Arrow file: {str(error).splitlines()[0]}", where=shown_name(file)) from None
    return number


def _batches(source):
    import pyarrow as pa

    try:
        opened = pa.ipc.open_file(source)
        return (opened.get_batch(i) for i in range(opened.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        return iter(pa.ipc.open_stream(source))


def _add(row: dict, column: str, number: int, file: Path, folder: Path, reading: Reading) -> None:
    content = row[column]
    if not isinstance(content, bytes) or not content:
        reading.left_out.append(LeftOut(Path(f"{file}#{number}"), "the row holds no picture bytes", "missing"))
        return
    captions: list[Caption] = []
    for name in TEXT_COLUMNS:
        merge_captions(captions, caption_of(row.get(name)))
    # one folder a row, so that two rows with the same picture stay two
    path = keep_picture(folder / str(number), f"{number}{extension_of(content)}", content)
    reading.entries.append(Entry(path, tuple(captions), layout="tencent-arrow"))
