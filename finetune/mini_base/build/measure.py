"""Measures a finished folder: `python -m finetune.mini_base.build.measure --model DIR --packages DIR`."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from .drawing import draw, open_pipeline, save_sheet
from .measures import ground_name, nearest
from .rasters import BUCKETS, ICON_EDGE, compose, rasterise_all
from .subjects import COLOURS, NAMED, Subject, is_held_out, load_subjects, plain_caption

FIRST_SEED = 1000
GROUNDS = tuple(name for name in COLOURS if name != "white")


def ground_of(row: int) -> str:
    """The coloured ground that a named subject is measured on: all 13 take turns."""
    return GROUNDS[row % len(GROUNDS)]


def true_pictures(icons: np.ndarray, colour: str, size) -> np.ndarray:
    ground = np.array(COLOURS[colour][0], np.float32) / 255
    return np.stack([compose(icon, ground, size) for icon in icons])


def shape_cell(pipeline, subjects: list[Subject], rasters: dict, language: str, is_coloured: bool, size) -> tuple[float, np.ndarray, list[str]]:
    """Share of the named subjects whose nearest among all 48 true pictures, on the same ground, is their own."""
    rows = range(len(NAMED))
    colours = [ground_of(row) if is_coloured else None for row in rows]
    prompts = [plain_caption(subjects[row], colours[row], language) for row in rows]
    pictures = draw(pipeline, prompts, size, FIRST_SEED)
    icons = rasters[ICON_EDGE[size]][:len(NAMED)]
    truths = {colour: true_pictures(icons, colour or "white", size) for colour in set(colours)}
    right = [nearest(pictures[row:row + 1], truths[colours[row]])[0] == row for row in rows]
    missed = [subjects[row].english[0] for row in rows if not right[row]]
    return float(np.mean(right)), pictures, missed


def shape_table(pipeline, subjects, rasters, report=print) -> tuple[list[dict], dict]:
    cells, drawn = [], {}
    for size in BUCKETS:
        for language in ("en", "zh"):
            for is_coloured in (False, True):
                score, pictures, missed = shape_cell(pipeline, subjects, rasters, language, is_coloured, size)
                cells.append({"size": f"{size[0]}x{size[1]}", "language": language, "ground": "coloured" if is_coloured else "white",
                              "score": round(score, 3), "missed": missed})
                drawn[size, language, is_coloured] = pictures
                report(json.dumps(cells[-1], ensure_ascii=False))
    return cells, drawn


def ground_scores(pipeline, subjects: list[Subject], count: int = 39) -> dict[str, float]:
    """Is the ground the one asked for, in combinations with the subject that were trained and that never were?"""
    scores = {}
    for name, wanted in (("trained combinations", False), ("never trained combinations", True)):
        pairs = [(row, colour) for row in range(len(NAMED)) for colour in GROUNDS if is_held_out(row, colour) == wanted]
        pairs = pairs[::max(1, len(pairs) // count)][:count]
        pictures = draw(pipeline, [plain_caption(subjects[row], colour, "en") for row, colour in pairs], BUCKETS[0], 7000)
        scores[name] = round(float(np.mean([ground_name(picture) == colour for picture, (_, colour) in zip(pictures, pairs)])), 3)
    return scores


def measure(model: Path, packages: Path, sheet: Path | None, report=print) -> dict:
    from .decoder import decoder_quality
    from .pipeline_folder import folder_size

    subjects = load_subjects(packages)
    rasters = rasterise_all(packages, [subject.icon for subject in subjects])
    pipeline = open_pipeline(model)
    results = {"bytes": folder_size(model), "decoder_db": decoder_quality(pipeline.vae, rasters)}
    report(json.dumps(results))
    results["shape"], drawn = shape_table(pipeline, subjects, rasters, report)
    results["grounds"] = ground_scores(pipeline, subjects)
    report(json.dumps(results["grounds"]))
    if sheet:
        save_sheet(list(drawn[BUCKETS[0], "en", False]), 12, sheet)
        save_sheet(list(drawn[BUCKETS[0], "zh", True]), 12, sheet.with_name(sheet.stem + "_coloured.png"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--packages", type=Path, required=True, help="node_modules folder with the pinned packages")
    parser.add_argument("--sheet", type=Path, help="also draw the named subjects into this PNG")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    results = measure(options.model, options.packages, options.sheet)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
