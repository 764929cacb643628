"""Which layout a folder or file has, and the reader for it. The decision is always said aloud in the reading's notes."""

from __future__ import annotations

import re
from pathlib import Path

from data_tools.errors import DataError
from data_tools.layouts.archives import read_zip
from data_tools.layouts.index_files import METADATA_NAMES, read_index_file
from data_tools.layouts.loaded_datasets import is_saved_dataset, read_dataset
from data_tools.layouts.other_tools import is_concepts, read_concepts, read_kohya_file
from data_tools.layouts.picture_folder import read_picture_folder, require_folder
from data_tools.layouts.tar_shards import read_tar_shards
from data_tools.layouts.tencent import is_index, load_json, read_arrow, read_index
from data_tools.near_names import nearest_path
from data_tools.progress import Progress
from data_tools.records import Reading, shown_name

LAYOUTS = ("auto", "folder", "zip", "webdataset", "index", "tencent-arrow", "kohya-toml", "onetrainer", "datasets")
HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
BY_SUFFIX = {".zip": "zip", ".tar": "webdataset", ".tgz": "webdataset", ".gz": "webdataset", ".jsonl": "index", ".csv": "index", ".parquet": "index", ".arrow": "tencent-arrow", ".toml": "kohya-toml"}


def read_layout(path: Path, *, layout: str = "auto", image_root: Path | None = None, progress: Progress = Progress()) -> Reading:
    """Read whatever `path` is, without opening pictures. Raises DataError when it is nothing we know."""
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}", fix=f"one of {', '.join(LAYOUTS)}")
    if not path.exists():
        # here/photo beside here/photos is a folder that was misspelt, and the Hub need not be asked for it.
        near, can_be_on_hub = nearest_path(path), layout == "auto" and HUB_NAME.match(str(path))
        if layout == "datasets" or (can_be_on_hub and near is None):
            return read_dataset(str(path), progress)
        fix = "give a folder of pictures, a file that names or holds them, or a Hub dataset as owner/name"
        if near is not None:
            fix = f"did you mean {near}?{' A dataset of this name on the Hub is read with --layout datasets.' if can_be_on_hub else ''}"
        raise DataError("there is no such folder or file", where=shown_name(path), fix=fix)
    found = layout if layout != "auto" else _detect(path)
    if found == "folder":
        require_folder(path)
        return read_picture_folder(path)
    if found == "zip":
        return read_zip(path, progress)
    if found == "webdataset":
        return read_tar_shards(_shards(path, ".tar"), progress)
    if found == "tencent-arrow":
        return read_index(path, progress) if path.suffix.lower() == ".json" else read_arrow(_shards(path, ".arrow"), progress)
    if found == "index":
        return read_dataset(path, progress) if path.suffix.lower() == ".parquet" and _holds_pictures(path) else read_index_file(path, image_root)
    readers = {"kohya-toml": read_kohya_file, "onetrainer": read_concepts}
    return readers[found](path) if found in readers else read_dataset(path, progress)


def _detect(path: Path) -> str:
    if path.is_dir():
        return _detect_folder(path)
    suffix = path.suffix.lower()
    if suffix in BY_SUFFIX:
        return BY_SUFFIX[suffix]
    if suffix != ".json":
        raise DataError("not a layout we know", where=shown_name(path), fix=f"a folder, or a file that ends in {', '.join(BY_SUFFIX)} or .json")
    data = load_json(path)
    if is_index(data):
        return "tencent-arrow"
    if is_concepts(data):
        return "onetrainer"
    if isinstance(data, dict) and "datasets" in data:
        return "kohya-toml"
    raise DataError("JSON that is neither an Arrow index, nor concepts, nor a kohya dataset", where=shown_name(path))


def _detect_folder(folder: Path) -> str:
    """Pictures in the folder itself always win; a folder without any may be a saved dataset, shards or Arrow files."""
    require_folder(folder)
    if is_saved_dataset(folder):
        return "datasets"
    names = [entry.name for entry in folder.iterdir()]
    if any(name in METADATA_NAMES for name in names):
        return "folder"
    for suffix, layout in ((".tar", "webdataset"), (".arrow", "tencent-arrow")):
        if any(name.lower().endswith(suffix) for name in names) and not read_picture_folder(folder).entries:
            return layout
    inside = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]  # as data sets lie on the Hub
    if inside and _holds_pictures(inside[0]) and not read_picture_folder(folder).entries:
        return "datasets"
    return "folder"


def _shards(path: Path, suffix: str) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.name.lower().endswith(suffix)) if path.is_dir() else [path]


def _holds_pictures(path: Path) -> bool:
    """Whether a Parquet file has a column of stored pictures (a struct with `bytes`) and not of paths."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not readable as Parquet: {str(error).splitlines()[0]}", where=shown_name(path)) from None
    return any(pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0 for field in schema)
