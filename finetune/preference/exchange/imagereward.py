"""ImageReward (Xu et al. 2023, arXiv 2304.05977): a list of {id, prompt, generations, ranking}.

ranking: one number a picture, lower is better, ties allowed, not necessarily consecutive. `rater` is ours, so that an
export keeps who said it; files without it are read as one annotator's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.atomic_files import write_text

from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.comparisons import Judgement
from finetune.preference.exchange.imported import ForeignEntry, entry_place, read_json_list, require, require_paths, require_ranks


def read_imagereward(path: Path) -> Iterator[ForeignEntry]:
    """One entry a ranking; a ranking of two pictures is a pair."""
    for number, entry in enumerate(read_json_list(path), 1):
        where = entry_place(path, number)
        require(entry, where, prompt=str, generations=list, ranking=list)
        pictures = require_paths(entry["generations"], "generations", where)
        ranks = require_ranks(entry["ranking"], len(pictures), "ranking", where)
        rater, identity = str(entry.get("rater") or "imagereward"), f"{path.name}|{entry.get('id', number)}|{number}"
        if len(pictures) > 2:
            yield ForeignEntry(where, entry["prompt"], pictures, rater, identity, ranking=ranks)
        else:
            tie = ranks[0] == ranks[1]
            yield ForeignEntry(where, entry["prompt"], pictures, rater, identity, choice=None if tie else int(ranks[1] < ranks[0]), tie=tie)


def write_imagereward(path: Path, folder: CandidateFolder, judgements: Sequence[Judgement]) -> tuple[int, list[tuple[str, str]]]:
    """(entries written, left out): pairs and rankings fit, scores do not."""
    entries, left_out = [], []
    for judgement in judgements:
        ranks = _ranks(judgement)
        if ranks is None:
            left_out.append((judgement.id, f"a {judgement.mode} without an order does not fit the form of ImageReward"))
            continue
        pictures = [folder.candidates()[item].path for item in judgement.items]
        entries.append({"id": judgement.id, "prompt": judgement.prompt, "generations": pictures, "ranking": ranks, "rater": judgement.rater})
    write_text(path, json.dumps(entries, ensure_ascii=False, indent=1))
    return len(entries), left_out


def _ranks(judgement: Judgement) -> list[int] | None:
    if judgement.mode == "pair":
        return [1 if judgement.tie or item == judgement.choice else 2 for item in judgement.items]
    return list(judgement.ranking) if judgement.ranking else None
