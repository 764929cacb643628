"""DPG-Bench (Hu et al. 2024, ELLA): one 2x2 grid a prompt for its grader, and its text results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.near_names import meant_path
from finetune.errors import BadInput
from finetune.evaluation.intervals import bootstrap_mean
from finetune.evaluation.official.imported import ImportedResult
from finetune.evaluation.prompts import SAFE_ID, EvaluationPrompt

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES_PER_PROMPT = 4


def read_prompts_folder(folder: Path | str) -> list[EvaluationPrompt]:
    """The prompts of `dpg_bench/prompts/<item_id>.txt`, named by their item id. Raises BadInput when there are none."""
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise BadInput("holds no <item_id>.txt", where=str(folder), fix="give ELLA's dpg_bench/prompts folder")
    prompts = []
    for path in files:
        if not SAFE_ID.fullmatch(path.stem):
            raise BadInput(f"the item id {path.stem[:40]!r} cannot be a file name", where=str(path))
        prompts.append(EvaluationPrompt(path.stem, path.read_text("utf-8", errors="replace").strip()))
    return prompts


def grid(pictures: Sequence[Image]) -> Image:
    """Four pictures of one size as the 2x2 grid that the grader cuts up: first row first."""
    from PIL import Image as images

    if len(pictures) != PICTURES_PER_PROMPT or len({picture.size for picture in pictures}) != 1:
        raise BadInput(f"a DPG-Bench grid is made of {PICTURES_PER_PROMPT} pictures of one size")
    width, height = pictures[0].size
    page = images.new("RGB", (2 * width, 2 * height))
    for index, picture in enumerate(pictures):
        page.paste(picture, (index % 2 * width, index // 2 * height))
    return page


def place_of(out: Path, item_id: str) -> Path:
    """out/<item_id>.png."""
    return out / f"{item_id}.png"


def read_results(path: Path | str, model: str) -> ImportedResult:
    """The score from the grader's text file: lines `path, s1, s2, s3, s4, mean`, then a summary; mean over prompts x 100.

    The grader passes over failures in silence, so the number of prompts is counted here and shown.
    """
    try:
        lines = Path(path).read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise BadInput((error.strerror or "cannot be read").lower(), where=str(path), fix=meant_path(path, "give the file that the grader wrote")) from None
    names, scores, pictures = [], [], 0
    for line in lines:
        fields = [field.strip() for field in line.rsplit(",", PICTURES_PER_PROMPT + 1)]
        try:
            numbers = [float(field) for field in fields[1:]]
        except ValueError:
            continue
        if len(numbers) == PICTURES_PER_PROMPT + 1 and all(0 <= number <= 1 for number in numbers):
            names.append(Path(fields[0]).stem)
            scores.append(100 * float(np.mean(numbers[:-1])))
            pictures += PICTURES_PER_PROMPT
    if not names:
        raise BadInput("holds no line `path, s1, s2, s3, s4, mean`", where=str(path), fix="give the grader's result text file, not its _detail file")
    interval = bootstrap_mean(np.array(scores), names, "dpg", (0.0, 100.0))
    return ImportedResult(model, "DPG-Bench", interval.value, interval.low, interval.high, 100, grader="mPLUG-large VQA (ELLA's dpg_bench)",
                          prompts=f"{len(set(names))} prompts", n=pictures, source="results file")
