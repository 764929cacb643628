"""Descriptions that other trainers keep of their folders: kohya's dataset TOML (or JSON) and OneTrainer's concepts."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_tools.errors import DataError
from data_tools.layouts.caption_files import clean_line, read_text
from data_tools.layouts.index_files import Row, rows_of_mapping
from data_tools.layouts.picture_folder import read_picture_folder
from data_tools.layouts.tencent import load_json
from data_tools.records import Caption, Entry, Reading, shown_name

MOST_REPEATS = 100_000
ONETRAINER_SPLITS = {"STANDARD": "train", "VALIDATION": "held_out", "PRIOR_PREDICTION": "regularisation"}
# Keys of a kohya subset that change pictures or captions while training; they belong into the recipe, not into the data.
TRAINING_KEYS = ("shuffle_caption", "keep_tokens", "flip_aug", "color_aug", "random_crop", "caption_dropout_rate", "caption_tag_dropout_rate", "alpha_mask", "face_crop_aug_range")


def is_concepts(data: object) -> bool:
    """Whether parsed JSON looks like OneTrainer's list of concepts."""
    return isinstance(data, list) and bool(data) and all(isinstance(item, dict) and "path" in item for item in data)


def read_kohya_file(path: Path) -> Reading:
    """Read a kohya dataset description: [general] < [[datasets]] < [[datasets.subsets]], the lower level wins."""
    data = _toml(path) if path.suffix.lower() == ".toml" else load_json(path)
    datasets = data.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise DataError("has no [[datasets]]", where=shown_name(path), fix="a kohya dataset file lists its folders in [[datasets.subsets]]")
    reading = Reading("kohya-toml")
    general = data.get("general") if isinstance(data.get("general"), dict) else {}
    count = 0
    for number, dataset in enumerate(datasets, 1):
        if not isinstance(dataset, dict) or not isinstance(dataset.get("subsets"), list):
            raise DataError(f"dataset {number} has no [[datasets.subsets]]", where=shown_name(path))
        seen = set()
        for subset in dataset["subsets"]:
            count += 1
            settings = general | {k: v for k, v in dataset.items() if k != "subsets"} | (subset if isinstance(subset, dict) else {})
            folder = settings.get("image_dir")
            if folder in seen:
                reading.warnings.append(f"{shown_name(str(folder))} is named twice in one dataset; read once, as kohya does")
                continue
            seen.add(folder)
            _add_subset(settings, count, path, reading)
    reading.notes.insert(0, f"layout: kohya-toml ({count} subsets; the numbers in folder names are not read, num_repeats is)")
    return reading


def _toml(path: Path) -> dict:
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"not valid TOML: {error}", where=shown_name(path)) from None
    except (OSError, RecursionError) as error:
        raise DataError(f"cannot be read: {error}", where=shown_name(path)) from None


def _add_subset(settings: dict, number: int, path: Path, reading: Reading) -> None:
    where = f"{shown_name(path)}, subset {number}"
    if not isinstance(settings.get("image_dir"), str):
        raise DataError("a subset names no image_dir", where=where)
    repeats = settings.get("num_repeats", 1)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or not 1 <= repeats <= MOST_REPEATS:
        raise DataError(f"num_repeats is {repeats!r}, not a whole number from 1 to {MOST_REPEATS}", where=where)
    rows = {}
    if settings.get("metadata_file"):
        meta = _below(path, str(settings["metadata_file"]), where)
        rows = rows_of_mapping(load_json(meta), meta, _below(path, settings["image_dir"], where))
    split = "regularisation" if settings.get("is_reg") else "train"
    prefix, suffix, words = (clean_line(str(settings.get(k) or "")) for k in ("caption_prefix", "caption_suffix", "class_tokens"))

    def describe(entry: Entry) -> Entry:
        row: Row | None = rows.get(entry.path.with_suffix("")) or rows.get(entry.path)
        captions = list(row.captions if row else [c for c in entry.captions if c.source != "folder_name"])
        if words and not any(c.kind == "plain" for c in captions):
            captions.append(Caption.written(words, "folder_name"))
        captions = [replace(c, text=clean_line(f"{prefix} {c.text} {suffix}")) if c.kind == "plain" else c for c in captions]
        return replace(entry, captions=tuple(captions), repeats=repeats, split=split, layout="kohya-toml")

    _add_folder(_below(path, settings["image_dir"], where), reading, describe, recursive=False)
    ignored = [key for key in TRAINING_KEYS if settings.get(key)]
    if ignored:
        reading.warnings.append(f"{where}: {', '.join(ignored)} belong to training; set them in the recipe")


def _below(path: Path, name: str, where: str) -> Path:
    found = path.parent / name
    if not found.exists():
        raise DataError(f"{shown_name(name)} is not there", where=where)
    return found


def _add_folder(folder: Path, reading: Reading, describe: Callable[[Entry], Entry], *, recursive: bool) -> None:
    inner = read_picture_folder(folder)
    kept = [entry for entry in inner.entries if recursive or entry.path.parent == folder]
    if len(kept) < len(inner.entries):
        reading.warnings.append(f"{shown_name(folder)}: {len(inner.entries) - len(kept)} pictures in folders below it are not part of the set")
    reading.entries += [describe(entry) for entry in kept]
    reading.left_out += inner.left_out
    reading.other_files += inner.other_files
    reading.warnings += inner.warnings


def read_concepts(path: Path) -> Reading:
    """Read OneTrainer's concepts JSON. Balancing by REPEATS becomes repeats; VALIDATION concepts are held out."""
    concepts = load_json(path)
    reading = Reading("onetrainer")
    reading.notes.append(f"layout: onetrainer ({len(concepts)} concepts)")
    for number, concept in enumerate(concepts, 1):
        where = f"{shown_name(path)}, concept {number}"
        if not isinstance(concept, dict) or not isinstance(concept.get("path"), str):
            raise DataError("a concept without a path", where=where)
        if concept.get("enabled") is False:
            reading.notes.append(f"concept {number} ({shown_name(concept['path'])}) is not enabled; left aside")
            continue
        _add_concept(concept, path, where, reading)
    return reading


def _add_concept(concept: dict, path: Path, where: str, reading: Reading) -> None:
    balancing = concept.get("balancing", 1.0)
    if not isinstance(balancing, (int, float)) or not 0 < balancing <= MOST_REPEATS:
        raise DataError(f"balancing is {balancing!r}, not a number above 0", where=where)
    repeats = max(1, round(balancing)) if concept.get("balancing_strategy", "REPEATS") == "REPEATS" else 1
    if repeats != balancing:
        reading.warnings.append(f"{where}: balancing {balancing:g} ({concept.get('balancing_strategy', 'REPEATS')}) is read as {repeats} repeats")
    text = concept.get("text") if isinstance(concept.get("text"), dict) else {}
    shared: tuple[Caption, ...] = ()
    if text.get("prompt_source") == "concept" and text.get("prompt_path"):
        lines = read_text(_below(path, str(text["prompt_path"]), where)).splitlines()
        shared = tuple(Caption.written(clean_line(line)) for line in lines if clean_line(line))
    split = ONETRAINER_SPLITS.get(str(concept.get("type", "STANDARD")), "train")

    def describe(entry: Entry) -> Entry:
        captions = shared or entry.captions
        if text.get("prompt_source") == "filename":
            captions = (Caption.written(clean_line(entry.path.stem.replace("_", " ")), "file_name"),)
        return replace(entry, captions=captions, repeats=repeats, split=split, layout="onetrainer")

    _add_folder(_below(path, concept["path"], where), reading, describe, recursive=bool(concept.get("include_subdirectories")))
