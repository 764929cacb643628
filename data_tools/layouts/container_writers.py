"""Write sets as containers that hold the picture bytes: tar shards, Tencent's Arrow files, Parquet, a zip."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_tools.images import EXTENSIONS
from data_tools.layouts.unpacking import extension_of
from data_tools.layouts.writers import Named, described, lost_by_texts, row_of, two_texts, write_sidecars

PICTURES_A_SHARD = 1000
ROWS_AN_ARROW_FILE = 5000  # as HunyuanDiT's csv2arrow.py
ROWS_A_BATCH = 64
EARLIEST = (1980, 1, 1, 0, 0, 0)  # the first date that zip knows; a fixed one makes the same set the same bytes


def write_webdataset(items: Sequence[Named], folder: Path, advance: Callable[..., None]) -> list[str]:
    """Shards of a thousand samples; keys are counters, because a dot in a file name would break the grouping."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(items), PICTURES_A_SHARD):
        with tarfile.open(folder / f"train-{start // PICTURES_A_SHARD:06d}.tar", "w", format=tarfile.PAX_FORMAT) as shard:
            for number, item in enumerate(items[start : start + PICTURES_A_SHARD], start):
                _add_sample(shard, f"{number:09d}", item)
                advance(1)
    return []


def _add_sample(shard: tarfile.TarFile, key: str, item: Named) -> None:
    record = item.record
    content = record.path.read_bytes()
    extension = item.extension if item.extension in EXTENSIONS else extension_of(content)
    about = row_of(item, item.file_name, None) | {"caption": record.caption or "", "source_name": item.file_name, "width": record.width, "height": record.height}
    about.pop("file_name"), about.pop("text")
    fields = {extension[1:]: content, "json": json.dumps(about, ensure_ascii=False).encode()}
    if record.caption:
        fields["txt"] = record.caption.encode()
    if record.mask:
        fields["mask.png"] = record.mask.read_bytes()
    for field, value in fields.items():
        member = tarfile.TarInfo(f"{key}.{field}")
        member.size = len(value)
        shard.addfile(member, io.BytesIO(value))


def write_tencent_arrow(items: Sequence[Named], folder: Path, advance: Callable[..., None]) -> list[str]:
    """arrows/NNNNN.arrow and jsons/pictures.json (index v2), which HunyuanDiT's IndexKits opens."""
    import pyarrow as pa

    schema = pa.schema([("text_zh", pa.string()), ("text_en", pa.string()), ("md5", pa.string()), ("width", pa.int64()), ("height", pa.int64()), ("image", pa.binary())])
    names, cumulative = [], []
    (folder / "arrows").mkdir(parents=True)
    (folder / "jsons").mkdir()
    for start in range(0, len(items), ROWS_AN_ARROW_FILE):
        part = items[start : start + ROWS_AN_ARROW_FILE]
        name = f"arrows/{start // ROWS_AN_ARROW_FILE:05d}.arrow"
        with pa.ipc.new_file(str(folder / name), schema) as writer:
            for rows in _batched(part):
                writer.write_batch(pa.RecordBatch.from_pylist([_arrow_row(item) for item in rows], schema=schema))
                advance(len(rows))
        names.append(name)
        cumulative.append(start + len(part))
    index = {
        "data_type": ["image"], "config_file": "", "indices_file": "", "arrow_files": names, "cum_length": cumulative,
        "group_length": [len(items)], "indices": list(range(len(items))), "example_indices": [],
    }
    (folder / "jsons" / "pictures.json").write_text(json.dumps(index) + "\n")
    return lost_by_texts(items)


def _arrow_row(item: Named) -> dict:
    content = item.record.path.read_bytes()
    chinese, english = two_texts(item.record)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return {"text_zh": chinese, "text_en": english, "md5": md5, "width": item.record.width, "height": item.record.height, "image": content}


def _batched(items: Sequence[Named]) -> Iterator[Sequence[Named]]:
    for start in range(0, len(items), ROWS_A_BATCH):
        yield items[start : start + ROWS_A_BATCH]


def write_parquet(items: Sequence[Named], folder: Path, advance: Callable[..., None]) -> list[str]:
    """One Parquet file with the bytes inside; `datasets` sees a column of pictures. No local path is written."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    text = datasets.Value("string")
    caption = {"text": text, "language": text, "kind": text, "source": text}
    features = datasets.Features(
        {"image": datasets.Image(), "file_name": text, "text": text, "captions": datasets.List(caption), "mask": datasets.Image(), "licence": text, "repeats": datasets.Value("int64"), "split": text}
    )
    folder.mkdir(parents=True, exist_ok=True)
    with pyarrow.parquet.ParquetWriter(folder / "train.parquet", features.arrow_schema) as writer:
        for rows in _batched(items):
            writer.write_table(pa.Table.from_pylist([_parquet_row(item) for item in rows], schema=features.arrow_schema))
            advance(len(rows))
    return []


def _parquet_row(item: Named) -> dict:
    record = item.record
    return {
        "image": {"bytes": record.path.read_bytes(), "path": item.file_name}, "file_name": item.file_name, "text": record.caption,
        "captions": [described(c) for c in record.captions], "mask": {"bytes": record.mask.read_bytes(), "path": f"{item.stem}.png"} if record.mask else None,
        "licence": record.licence, "repeats": record.repeats, "split": record.split,
    }


def write_zip(items: Sequence[Named], folder: Path, advance: Callable[..., None]) -> list[str]:
    """pictures.zip: the flat folder with caption files in an archive."""
    inside = folder / "pictures"
    lost = write_sidecars(items, inside, advance)
    with zipfile.ZipFile(folder / "pictures.zip", "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in inside.rglob("*") if p.is_file()):
            archive.writestr(zipfile.ZipInfo(path.relative_to(inside).as_posix(), EARLIEST), path.read_bytes())
            path.unlink()
    for path in sorted((p for p in inside.rglob("*") if p.is_dir()), reverse=True):
        path.rmdir()
    inside.rmdir()
    return lost
