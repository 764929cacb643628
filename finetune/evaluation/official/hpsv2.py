"""HPSv2's benchmark (Wu et al. 2023): pictures by style for its scorer, and single scores read back."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from data_tools.near_names import meant_path
from finetune.errors import BadInput
from finetune.evaluation.intervals import bootstrap_mean
from finetune.evaluation.official.imported import ImportedResult
from finetune.evaluation.prompts import EvaluationPrompt

PICTURES_PER_PROMPT = 1
STYLES = ("anime", "concept-art", "paintings", "photo")


def read_prompts_folder(folder: Path | str) -> list[EvaluationPrompt]:
    """Prompts from `<style>.json`, each a list of texts; the style is the tag. Raises BadInput when no style is there."""
    prompts = []
    for style in STYLES:
        path = Path(folder) / f"{style}.json"
        if not path.exists():
            continue
        try:
            texts = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            raise BadInput("is not JSON in UTF-8", where=str(path)) from None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadInput("is not a list of prompts", where=str(path))
        prompts += [EvaluationPrompt(f"{style}-{index:05d}", text, (style,)) for index, text in enumerate(texts)]
    if not prompts:
        raise BadInput("holds no anime.json, concept-art.json, paintings.json or photo.json", where=str(folder), fix="give HPSv2's benchmark prompts folder")
    return prompts


def place_of(out: Path, prompt: EvaluationPrompt) -> Path:
    """out/<style>/<index>.jpg, as `hpsv2.evaluate` reads it."""
    style, _, index = prompt.prompt_id.rpartition("-")
    return out / style / f"{index}.jpg"


def read_results(path: Path | str, model: str) -> ImportedResult:
    """Scores from CSV with the columns `file` (or prompt) and `score`, and `style` if known; the mean over styles x 100.

    Scores may stand as cosines (0.28) or times 100 (28); what is below 1 is multiplied.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path), fix=meant_path(path, "give the file that the grader wrote")) from None
    try:
        scores = np.array([float(row["score"]) for row in rows])
    except (KeyError, TypeError, ValueError):
        raise BadInput("has no column `score` of numbers", where=str(path)) from None
    if not len(scores) or not np.isfinite(scores).all():
        raise BadInput("holds no finite scores", where=str(path))
    scores = scores * 100 if np.abs(scores).max() < 1 else scores
    styles = [row.get("style") or "all" for row in rows]
    names = [row.get("prompt") or row.get("file") or str(index) for index, row in enumerate(rows)]
    by_style = {style: float(scores[[own == style for own in styles]].mean()) for style in dict.fromkeys(styles)}
    interval = bootstrap_mean(scores, names, "hps")
    value = float(np.mean(list(by_style.values())))
    shift = value - interval.value
    low, high = (None, None) if interval.low is None else (interval.low + shift, interval.high + shift)
    return ImportedResult(model, "HPSv2.1", value, low, high, None, grader="HPS v2.1", prompts=f"{len(set(names))} prompts", n=len(scores), source="results file",
                          detail=by_style if len(by_style) > 1 else None)
