"""Whatever the `datasets` library loads: a saved dataset, Parquet files with pictures inside, or an identifier on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import DataError
from data_tools.layouts.caption_files import caption_of, merge_captions
from data_tools.layouts.index_files import TEXT_COLUMNS
from data_tools.layouts.unpacking import extension_of, keep_picture, unpacked_folder
from data_tools.progress import Progress
from data_tools.records import Caption, Entry, LeftOut, Reading, shown_name

if TYPE_CHECKING:
    import datasets

SPLITS = {"validation": "held_out", "valid": "held_out", "val": "held_out", "test": "held_out", "held_out": "held_out", "regularisation": "regularisation"}

DATASET_NAMES = ("dataset_dict.json", "dataset_info.json", "state.json")  # of several splits; of one, together with its state


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    several, one, state = (folder / name for name in DATASET_NAMES)
    return several.is_file() or (one.is_file() and state.is_file())


def read_dataset(source: Path | str, progress: Progress = Progress()) -> Reading:
    """Read every split of a dataset: a folder written by `save_to_disk` or downloaded, a Parquet file, or an identifier on the Hub.

    Pictures are taken as stored, byte for byte; their rows' captions, licence, repeats and split come along.
    """
    reading = Reading("datasets")
    by_split = _load(source, progress)
    total = sum(len(dataset) for dataset in by_split.values())
    reading.notes.append(f"layout: datasets ({', '.join(f'{name}: {len(d)} rows' for name, d in by_split.items())})")
    folder = unpacked_folder(Path(str(source)))
    with progress.phase("reading rows", total) as advance:
        for name, dataset in by_split.items():
            _read_split(dataset, name, source, folder, reading, advance)
    return reading


def _load(source: Path | str, progress: Progress) -> dict[str, datasets.Dataset]:
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if path.is_dir() and is_saved_dataset(path):
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=str(path))
        else:
            progress.say(f"loading {source} with the datasets library")
            loaded = datasets.load_dataset(str(source))
    except datasets.exceptions.DatasetNotFoundError as error:
        locked = "gated" in str(error)
        what = "its owner asks for consent first" if locked else "there is no such data set, neither here nor on the Hub"
        raise DataError(what, where=shown_name(str(source)), fix="accept its terms on its page and log in with `hf auth login`" if locked else "check the spelling; a private one needs `hf auth login`") from None
    except ConnectionError:
        raise DataError("it is not here, and the Hub cannot be reached", where=shown_name(str(source)), fix="check the spelling of the folder, the network and HF_HUB_OFFLINE") from None
    except Exception as error:  # the library raises whatever its many readers raise
        raise DataError(f"the datasets library cannot load it: {' '.join(str(error).split())[:300]}", where=shown_name(str(source))) from None
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _read_split(dataset: datasets.Dataset, name: str, source: Path | str, folder: Path, reading: Reading, advance: Any) -> None:
    import datasets

    pictures = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not pictures:
        raise DataError(f"no picture column (columns: {', '.join(dataset.column_names)})", where=f"{shown_name(str(source))}, split {name}")
    for column in pictures:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    mask_column = next((column for column in pictures if "mask" in column), None)
    column = next((c for c in ("image", *pictures) if c in pictures and c != mask_column), pictures[0])
    for number in range(len(dataset)):
        where = Path(f"{source}#{name}-{number}")
        try:
            row = dataset[number]
            content = _content(row[column])
        except Exception as error:  # one broken row must not end the reading
            reading.left_out.append(LeftOut(where, f"the row cannot be read: {' '.join(str(error).split())[:200]}", "bad_row"))
        else:
            reading.entries += _entry(row, content, row.get(mask_column) if mask_column else None, where, folder, name, number, reading)
        advance(1)


def _content(value: dict | None) -> bytes | None:
    if not value:
        return None
    if value.get("bytes"):
        return value["bytes"]
    path = value.get("path")
    return Path(path).read_bytes() if path and os.path.isfile(path) else None


def _entry(row: dict, content: bytes | None, mask: dict | None, where: Path, folder: Path, split: str, number: int, reading: Reading) -> list[Entry]:
    if not content:
        reading.left_out.append(LeftOut(where, "the row holds no picture", "missing"))
        return []
    captions: list[Caption] = []
    for column in TEXT_COLUMNS:
        merge_captions(captions, caption_of(row.get(column)))
    licence, repeats = row.get("licence", row.get("license")), row.get("repeats")
    path = keep_picture(folder / f"{split}-{number}", f"{number}{extension_of(content)}", content)
    mask_content = _content(mask)
    mask_path = keep_picture(folder / f"{split}-{number}", f"{number}-mask{extension_of(mask_content)}", mask_content) if mask_content else None
    said = row.get("split") if row.get("split") in ("train", "held_out", "regularisation") else SPLITS.get(split, "train")
    return [Entry(path, tuple(captions), mask_path, licence if isinstance(licence, str) and licence else None, "datasets", repeats if isinstance(repeats, int) and repeats > 0 else 1, said)]
