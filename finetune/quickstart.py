"""The main job on what comes with the program: learn the bundled style on the embedded model, and measure honestly
on subjects that were not among the training pictures."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_tools.atomic_files import whole_file
from data_tools.progress import Progress
from finetune import mini_base
from finetune.recipe import Recipe, load_recipe
from finetune.recipe_shelf import find_recipe, fitting

if TYPE_CHECKING:
    from finetune.training.run import TrainingResult

RECIPE = "mini/style"
# The before/after pictures are drawn with seeds that count up from here.
FIRST_SEED = 4000


@dataclass(frozen=True)
class HeldOut:
    """Subjects of the style that are not trained: their captions and true pictures, (64, 64) RGB."""

    captions: tuple[str, ...]
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True)
class QuickstartResult:
    """palette: 0 the same colours in the same amounts, 1 nothing in common.  shape: share of pictures whose nearest true
    picture is their own; `chance` is what guessing gives. Each as (before, after)."""

    training: TrainingResult
    palette: tuple[float, float]
    shape: tuple[float, float]
    chance: float
    subjects: int
    seconds: float


def held_out() -> HeldOut:
    """The held-out subjects, by file name."""
    paths = sorted(mini_base.held_out_folder().glob("*.png"))
    captions = tuple(path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths)
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    return HeldOut(captions, tuple(pictures))


def quickstart_recipe(subjects: HeldOut, changes: list[str] | None = None) -> Recipe:
    """The shipped recipe with the bundled pictures, 8-bit AdamW by name, and the held-out subjects as samples."""
    width, height = subjects.pictures[0].size
    overrides = [
        f"data.folder={json.dumps(str(mini_base.style_folder()))}", f"data.trigger={json.dumps(mini_base.TRIGGER)}", "training.optimizer=adamw8bit",
        f"samples.prompts={json.dumps(list(subjects.captions), ensure_ascii=False)}", f"samples.seed={FIRST_SEED}", f"samples.width={width}", f"samples.height={height}",
    ]
    path = find_recipe(RECIPE)
    return load_recipe(path, fitting(path, overrides + (changes or [])))


def quickstart(out: Path, progress: Progress, changes: list[str] | None = None) -> QuickstartResult:
    """Train in `out`, measure, and put before, after and the true style side by side on the run's sheet."""
    from finetune.mini_base.build.measures import palette_distance, shape_score
    from finetune.training.report import write_report
    from finetune.training.run import train
    from finetune.training.run_folder import RunFolder

    began = time.monotonic()
    subjects = held_out()
    result = train(quickstart_recipe(subjects, changes), out, progress=progress)
    before, after = [_open_all(paths) for paths in (result.before, result.after)]
    truth = _as_array(subjects.pictures)
    palette = tuple(palette_distance(_as_array(pictures), truth) for pictures in (before, after))
    shape = tuple(shape_score(_as_array(pictures), truth) for pictures in (before, after))
    title = f"{len(before)} subjects that were not trained, before and after, and how the style really draws them"
    _write_sheet(result.sheet, before, after, subjects, title)
    write_report(RunFolder(out))
    return QuickstartResult(result, palette, shape, 1 / len(before), len(before), round(time.monotonic() - began, 1))


def _open_all(paths: list[Path]) -> list[Image.Image]:
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    return pictures


def _as_array(pictures: list[Image.Image] | tuple[Image.Image, ...]) -> np.ndarray:
    """(n, height, width, 3) float32 in [0, 1]."""
    return np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])


def _write_sheet(path: Path, before: list[Image.Image], after: list[Image.Image], subjects: HeldOut, title: str) -> None:
    from finetune.sampling_sheets import before_after_sheet

    sheet = before_after_sheet(before, after, subjects.captions, title=title, truth=subjects.pictures, per_row=8)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
