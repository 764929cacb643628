"""Write picture folders that other tools read: caption files, kohya, OneTrainer, metadata files, Tencent's CSV.

Pictures are copied byte for byte. What a form has no place for is written into a `.json` beside the picture where that
is harmless to the other tool, and reported as lost where it is not.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.layouts.unpacking import UNSAFE, extension_of
from data_tools.records import Caption, ImageRecord, best_caption
from data_tools.thinking import record_problems, thinking_path

SPLIT_FOLDERS = {"train": "train", "held_out": "validation", "regularisation": "reg"}
CONCEPT_TYPES = {"train": "STANDARD", "held_out": "VALIDATION", "regularisation": "PRIOR_PREDICTION"}
# A stem that ends like this would make the reader take the picture for a mask or a caption in another language.
MISLEADING_STEM = re.compile(r"(-masklabel|-condlabel|_mask)$")


@dataclass(frozen=True)
class Named:
    """A record with the name it gets in the written set: a stem that no other has (also ignoring case), and an extension."""

    record: ImageRecord
    stem: str
    extension: str

    @property
    def file_name(self) -> str:
        return self.stem + self.extension


Writer = Callable[[Sequence[Named], Path, Callable[..., None]], list[str]]


def named(records: Sequence[ImageRecord]) -> list[Named]:
    """Names for writing: the own name where it is safe and free, else with a number."""
    taken: set[str] = set()
    found = []
    for record in records:
        stem = UNSAFE.sub("_", os.path.splitext(record.path.name)[0]).replace(".", "_").strip(" _")[:100] or "picture"
        stem = MISLEADING_STEM.sub(r"\1-", stem)
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        found.append(Named(record, name, _extension(record.path)))
    return found


def _extension(path: Path) -> str:
    extension = path.suffix.lower()
    if re.fullmatch(r"\.[a-z0-9]{2,5}", extension) and extension not in (".txt", ".json", ".img"):
        return extension
    with open(path, "rb") as file:
        return extension_of(file.read(16))


def described(caption: Caption) -> dict:
    """A caption as JSON data that `caption_files.caption_of` reads back."""
    return {"text": caption.text, "language": caption.language, "kind": caption.kind, "source": caption.source}


def needs_description(record: ImageRecord) -> bool:
    """Whether a plain text alone would not say all about the record's captions."""
    return bool(record.captions) and record.captions != (Caption.written(record.captions[0].text),)


def is_thinking(caption: Caption) -> bool:
    """Whether a caption is a valid thinking record, which has a file of its own."""
    try:
        return caption.kind == "thinking" and not record_problems(json.loads(caption.text))
    except (ValueError, RecursionError):
        return False


def write_beside(item: Named, folder: Path, *, mask_suffix: str | None = None) -> None:
    """Copy the picture into `folder` with its caption files; masks go to masks/ or, with a suffix, beside it."""
    record = item.record
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(record.path, folder / item.file_name)
    plain = best_caption(record.captions)
    if plain:
        (folder / f"{item.stem}.txt").write_text(plain.text + "\n", encoding="utf-8")
    thinking = next((c for c in record.captions if is_thinking(c)), None)
    if thinking:
        thinking_path(folder / item.file_name).write_text(thinking.text + "\n", encoding="utf-8")
    rest = [c for c in record.captions if c is not thinking]
    about = {}
    if rest and rest != [Caption.written(rest[0].text)]:
        about["captions"] = [described(c) for c in rest]
    if record.licence:
        about["licence"] = record.licence
    if record.repeats != 1:
        about["repeats"] = record.repeats
    if about:
        (folder / f"{item.stem}.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if record.mask:
        target = folder / f"{item.stem}{mask_suffix}.png" if mask_suffix else folder / "masks" / f"{item.stem}.png"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(record.mask, target)


def _split_folder(record: ImageRecord, items: Sequence[Named]) -> Path:
    """No extra level while everything is for training; else one folder a split."""
    if all(item.record.split == "train" for item in items):
        return Path()
    return Path(SPLIT_FOLDERS[record.split])


def write_sidecars(items: Sequence[Named], folder: Path, advance: Callable[..., None]) -> list[str]:
    """A flat folder with .txt files."""
    for item in items:
        write_beside(item, folder / _split_folder(item.record, items))
        advance(1)
    return []


def write_kohya(items: Sequence[Named], folder: Path, advance: Callable[..., None]) -> list[str]:
    """Folders named <repeats>_<words>; repeats go into the name."""
    for item in items:
        # kohya's class words serve pictures without a caption; ours stay without one, so the words must not be read back
        write_beside(item, folder / _split_folder(item.record, items) / f"{item.record.repeats}_pictures")
        advance(1)
    without = sum(not item.record.caption for item in items)
    return [f"{without} pictures without a caption get the folder's word \"pictures\" as their caption"] if without else []


def write_onetrainer(items: Sequence[Named], folder: Path, advance: Callable[..., None]) -> list[str]:
    """One folder for each split and number of repeats, and concepts.json that names them."""
    concepts = {}
    for item in items:
        record = item.record
        name = f"{SPLIT_FOLDERS[record.split]}-{record.repeats}"
        write_beside(item, folder / name, mask_suffix="-masklabel")
        concepts[name] = {
            "name": name, "path": name, "enabled": True, "type": CONCEPT_TYPES[record.split], "include_subdirectories": False,
            "balancing": float(record.repeats), "balancing_strategy": "REPEATS", "text": {"prompt_source": "sample"},
        }
        advance(1)
    (folder / "concepts.json").write_text(json.dumps([concepts[name] for name in sorted(concepts)], indent=1, ensure_ascii=False) + "\n")
    return []


def row_of(item: Named, picture: str, mask: str | None) -> dict:
    """One row for metadata files, Parquet and the json of a shard."""
    record = item.record
    row: dict = {"file_name": picture, "text": record.caption or ""}
    if needs_description(record):
        row["captions"] = [described(c) for c in record.captions]
    if mask:
        row["mask_file_name"] = mask
    optional = (("licence", record.licence, None), ("repeats", record.repeats, 1), ("split", record.split, "train"))
    return row | {key: value for key, value, usual in optional if value != usual}


def write_metadata(items: Sequence[Named], folder: Path, advance: Callable[..., None]) -> list[str]:
    """images/ and metadata.jsonl, as the `imagefolder` loader of `datasets` reads it."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for item in items:
        shutil.copyfile(item.record.path, folder / "images" / item.file_name)
        mask = f"masks/{item.stem}.png" if item.record.mask else None
        if mask:
            (folder / "masks").mkdir(exist_ok=True)
            shutil.copyfile(item.record.mask, folder / mask)
        lines.append(json.dumps(row_of(item, f"images/{item.file_name}", mask), ensure_ascii=False) + "\n")
        advance(1)
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return []


def write_tencent_csv(items: Sequence[Named], folder: Path, advance: Callable[..., None]) -> list[str]:
    """images/ and csvfile/image_text.csv with the columns that HunyuanDiT's csv2arrow.py selects."""
    (folder / "images").mkdir(parents=True)
    (folder / "csvfile").mkdir()
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["img_path", "text_zh", "text_en"])
    for item in items:
        shutil.copyfile(item.record.path, folder / "images" / item.file_name)
        rows.writerow([f"images/{item.file_name}", *two_texts(item.record)])
        advance(1)
    (folder / "csvfile" / "image_text.csv").write_text(table.getvalue(), encoding="utf-8")
    return lost_by_texts(items)


def two_texts(record: ImageRecord) -> tuple[str, str]:
    """(text_zh, text_en). HunyuanDiT trains on text_zh, so without a Chinese caption it gets the English one."""
    chinese, english = (best_caption(record.captions, language=language) for language in ("zh", "en"))
    first = chinese or english or best_caption(record.captions)
    return first.text if first else "", english.text if english else ""


def lost_by_texts(items: Sequence[Named]) -> list[str]:
    """What a form with one Chinese and one English text a picture cannot say."""
    kept = [{text for text in two_texts(item.record) if text} for item in items]
    counts = Counter()
    for item, texts in zip(items, kept, strict=True):
        record = item.record
        counts["captions beyond one in Chinese and one in English"] += any(c.text not in texts for c in record.captions)
        counts["who wrote the caption"] += any(c.text in texts and c != Caption.written(c.text) for c in record.captions)
        counts["the mask"] += record.mask is not None
        counts["the licence"] += record.licence is not None
        counts["repeats"] += record.repeats != 1
        counts["the split"] += record.split != "train"
    return [f"{count} pictures lose {what}" for what, count in counts.items() if count]
