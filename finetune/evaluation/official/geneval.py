"""GenEval (Ghosh et al. 2023, djghosh13/geneval): folders for its detector, and its results with an interval over prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.atomic_files import write_text
from data_tools.near_names import meant_path
from finetune.errors import BadInput
from finetune.evaluation.intervals import bootstrap_mean
from finetune.evaluation.official.imported import ImportedResult
from finetune.evaluation.prompts import EvaluationPrompt

PICTURES_PER_PROMPT = 4
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def read_metadata(path: Path | str) -> list[dict[str, Any]]:
    """The lines of `evaluation_metadata.jsonl`. Raises BadInput for a line without prompt or tag."""
    found = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry["prompt"], str) or not isinstance(entry["tag"], str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadInput("is no GenEval prompt (prompt and tag are needed)", where=f"{path}, line {number}") from None
        found.append(entry)
    if not found:
        raise BadInput("holds no prompts", where=str(path))
    return found


def _lines(path: Path | str) -> list[str]:
    try:
        return Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}", where=str(path), fix=meant_path(path, "give the benchmark's file, or the one that its grader wrote")) from None


def prompts_of(metadata: Sequence[dict[str, Any]]) -> list[EvaluationPrompt]:
    """The prompts to draw, named by their place, which is their folder."""
    return [EvaluationPrompt(f"{index:05d}", entry["prompt"], (entry["tag"],)) for index, entry in enumerate(metadata)]


def place_of(out: Path, index: int, picture: int) -> Path:
    """out/00012/samples/0003.png: digits only, as the grader demands."""
    return out / f"{index:05d}" / "samples" / f"{picture:04d}.png"


def write_metadata(out: Path, index: int, entry: dict[str, Any]) -> None:
    """The prompt's own line beside its pictures."""
    write_text(out / f"{index:05d}" / "metadata.jsonl", json.dumps(entry) + "\n")


def read_results(path: Path | str, model: str) -> ImportedResult:
    """The score from the grader's results JSONL: the unweighted mean of the accuracies by tag, in percent, as GenEval's own summary.

    The interval resamples prompts within their tags. Raises BadInput for lines that are no results.
    """
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((str(row["tag"]), str(row["prompt"]), bool(row["correct"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadInput("is no GenEval result (tag, prompt and correct are needed)", where=f"{path}, line {number}") from None
    if not rows:
        raise BadInput("holds no results", where=str(path))
    tags = list(dict.fromkeys(tag for tag, _, _ in rows))
    by_tag, variance = {}, 0.0
    for tag in tags:
        own = [(prompt, correct) for row_tag, prompt, correct in rows if row_tag == tag]
        by_tag[tag] = 100 * float(np.mean([correct for _, correct in own]))
        interval = bootstrap_mean(np.array([100.0 * correct for _, correct in own]), [prompt for prompt, _ in own], f"geneval {tag}", (0.0, 100.0))
        variance += ((interval.high - interval.low) / 3.92) ** 2 if interval.low is not None else float("nan")
    score, half = float(np.mean(list(by_tag.values()))), 1.96 * variance**0.5 / len(tags)
    missing = [tag for tag in TAGS if tag not in by_tag]
    told = "evaluation_metadata.jsonl" if not missing else f"a part without {', '.join(missing)}"
    has_interval = np.isfinite(half)
    return ImportedResult(model, "GenEval", score, max(0.0, score - half) if has_interval else None, min(100.0, score + half) if has_interval else None, 100,
                          grader="GenEval's Mask2Former and CLIP ViT-L/14", prompts=f"{len({prompt for _, prompt, _ in rows})} prompts, {told}", n=len(rows),
                          source="results file", detail=by_tag)
