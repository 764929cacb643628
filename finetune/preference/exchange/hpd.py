"""HPD v2 (Wu et al. 2023, arXiv 2306.09341): `train.json` with pairs, `test.json` with rankings and who gave them.

train: prompt, file_path (or image_path) [2], human_preference [2] (1 = preferred), user_hash.
test: prompt, image_path [n], rank [n] (averaged over annotators), raw_annotations [{rank, user_hash}].
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.atomic_files import write_text
from data_tools.errors import DataError

from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.comparisons import Judgement
from finetune.preference.exchange.imported import ForeignEntry, entry_place, read_json_list, require, require_paths, require_ranks


def read_hpd(path: Path) -> Iterator[ForeignEntry]:
    """Entries of either file; a pair without a preferred picture is a tie."""
    for number, entry in enumerate(read_json_list(path), 1):
        where = entry_place(path, number)
        require(entry, where, prompt=str)
        key = "file_path" if "file_path" in entry else "image_path"
        require(entry, where, **{key: list})
        pictures = require_paths(entry[key], key, where)
        if "human_preference" in entry:
            yield _pair(entry, pictures, where, f"{path.name}|{number}")
        else:
            yield from _rankings(entry, pictures, where, f"{path.name}|{number}")


def _pair(entry: dict, pictures: tuple[str, ...], where: str, identity: str) -> ForeignEntry:
    require(entry, where, human_preference=list)
    preference = entry["human_preference"]
    if len(pictures) != 2 or preference not in ([0, 1], [1, 0], [0, 0], [1, 1]):
        raise DataError("`human_preference` must be 1 for the preferred of two pictures and 0 for the other", where=where)
    choice = preference.index(1) if sum(preference) == 1 else None
    return ForeignEntry(where, entry["prompt"], pictures, _rater(entry), identity, choice=choice, tie=choice is None)


def _rankings(entry: dict, pictures: tuple[str, ...], where: str, identity: str) -> Iterator[ForeignEntry]:
    annotations = entry.get("raw_annotations") or [entry]
    if not isinstance(annotations, list):
        raise DataError("`raw_annotations` must be a list", where=where)
    for place, annotation in enumerate(annotations):
        require(annotation, where, rank=list)
        ranks = require_ranks(annotation["rank"], len(pictures), "rank", where)
        yield ForeignEntry(where, entry["prompt"], pictures, _rater(annotation), f"{identity}|{place}", ranking=ranks)


def _rater(entry: dict) -> str:
    return str(entry.get("user_hash") or "hpd")


def write_hpd(path: Path, folder: CandidateFolder, judgements: Sequence[Judgement]) -> tuple[int, list[tuple[str, str]]]:
    """(entries written, left out). Pairs make the train form; rankings alone make the test form."""
    pairs = [judgement for judgement in judgements if judgement.mode == "pair"]
    form = "pair" if pairs else "rank"
    chosen = [judgement for judgement in judgements if judgement.mode == form and (form == "pair" or judgement.ranking)]
    left_out = [(judgement.id, f"a {judgement.mode} does not fit the {form} form of HPD") for judgement in judgements if judgement not in chosen]
    entries = [_train_entry(folder, judgement) for judgement in chosen] if form == "pair" else _test_entries(folder, chosen)
    write_text(path, json.dumps(entries, ensure_ascii=False, indent=1))
    return len(chosen), left_out


def _paths(folder: CandidateFolder, judgement: Judgement) -> list[str]:
    return [folder.candidates()[item].path for item in judgement.items]


def _train_entry(folder: CandidateFolder, judgement: Judgement) -> dict[str, Any]:
    preference = [int(item == judgement.choice) for item in judgement.items]
    return {"prompt": judgement.prompt, "file_path": _paths(folder, judgement), "human_preference": preference, "user_hash": judgement.rater}


def _test_entries(folder: CandidateFolder, judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """One entry a set of pictures, with every annotator's ranking brought to the order of the first."""
    entries: dict[frozenset[str], dict[str, Any]] = {}
    orders: dict[frozenset[str], tuple[str, ...]] = {}
    for judgement in judgements:
        key = frozenset(judgement.items)
        order = orders.setdefault(key, judgement.items)
        entry = entries.setdefault(key, {"prompt": judgement.prompt, "image_path": [folder.candidates()[item].path for item in order], "rank": [], "raw_annotations": []})
        ranks = dict(zip(judgement.items, judgement.ranking, strict=True))
        entry["raw_annotations"].append({"rank": [ranks[item] for item in order], "user_hash": judgement.rater})
    for entry in entries.values():
        columns = zip(*(annotation["rank"] for annotation in entry["raw_annotations"]), strict=True)
        entry["rank"] = [sum(column) / len(column) for column in columns]
    return list(entries.values())
