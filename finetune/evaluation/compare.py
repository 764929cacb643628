"""Adapters and their base side by side: draw, measure, resample, and write down what can be said."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.progress import Progress
from finetune.evaluation.drawing import DrawingSettings, PictureFolder, Studio, base_files
from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure, choose_measures
from finetune.evaluation.pictures import MOST_REFERENCES, TRAINING_EDGE, PictureSet, load_pictures
from finetune.evaluation.prompts import EvaluationPrompt
from finetune.evaluation.results import EvaluationFolder, keys_of, pictures_asked_for
from finetune.evaluation.subjects import Subject
from finetune.evaluation.table import result_of

if TYPE_CHECKING:
    from finetune.families.base_models import BaseModel


@dataclass(frozen=True)
class Comparison:
    """What is compared and how. seeds: each prompt is drawn with each.  references: pictures of the style.
    training: what the adapters were trained on.  weights: model name -> folder for measures that need one.
    measures: names, or None for all that can be taken.  height, width: pixels, None takes the base's own size.
    """

    prompts: Sequence[EvaluationPrompt]
    subjects: Sequence[Subject]
    seeds: Sequence[int] = (0, 1)
    steps: int = 20
    guidance: float = 5.0
    negative: str = ""
    height: int | None = None
    width: int | None = None
    references: Path | None = None
    training: Path | None = None
    measures: Sequence[str] | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    batch_size: int = 8


def drawing_settings(base: BaseModel, comparison: Comparison) -> DrawingSettings:
    """The settings that every picture of the comparison shares."""
    from finetune.generation import usual_size

    usual = usual_size(base)
    return DrawingSettings(base.identifier, base.revision, base_files(base.folder), tuple(comparison.seeds), comparison.steps, comparison.guidance,
                           comparison.negative, comparison.height or usual, comparison.width or usual)


def compare(base: BaseModel, comparison: Comparison, out: Path | str, progress: Progress | None = None) -> dict[str, Any]:
    """Draw, measure and compare; writes `evaluation.json` and `report.html` into `out` and returns the result's content.

    A second call with the same settings draws and measures only what is missing. Raises BadInput (settings, pictures,
    measures), AdapterError.
    """
    from finetune.evaluation.report_page import write_report

    progress = progress or Progress()
    folder, settings = EvaluationFolder(out), drawing_settings(base, comparison)
    folder.claim(settings)
    area = settings.height * settings.width
    references = _load(comparison.references, area, MOST_REFERENCES, progress, "reference")
    training = _load(comparison.training, TRAINING_EDGE**2, None, progress, "training")
    studio = Studio(base, settings, [prompt.prompt for prompt in comparison.prompts], comparison.subjects, progress)
    wanted = [(prompt, seed) for prompt in comparison.prompts for seed in comparison.seeds]
    folders = {subject.name: PictureFolder(folder.pictures / subject.folder, settings) for subject in comparison.subjects}
    drawn = sum(studio.draw(subject, folders[subject.name], wanted, comparison.batch_size) for subject in comparison.subjects)
    evidence = _evidence(comparison, studio, folders, references, training)
    measures, left_out = choose_measures(comparison.measures, evidence[comparison.subjects[0].name].at_hand)
    for name, reason in left_out.items():
        progress.say(f"not measured: {name}: {reason}")
    values = _measure(folder, comparison, measures, evidence, _against(references, training, comparison), progress)
    result = result_of(base, comparison, settings, measures, left_out, evidence, values) | {
        "imported": folder.imported(), "drawn": drawn, "references": _told(references), "training": _told(training),
        "pictures": {subject.name: f"pictures/{subject.folder}" for subject in comparison.subjects}}
    folder.write_result(result)
    write_report(folder.report, result, {name: each.pictures for name, each in evidence.items()}, evidence[comparison.subjects[0].name])
    return result


def _load(folder: Path | None, area: int, most: int | None, progress: Progress, purpose: str) -> PictureSet | None:
    return None if folder is None else load_pictures(folder, area=area, most=most, progress=progress, purpose=purpose)


def _told(pictures: PictureSet | None) -> dict[str, Any] | None:
    if pictures is None:
        return None
    left_out = [{"path": path.name, "reason": reason} for path, reason in pictures.left_out]
    return {"pictures": len(pictures.pictures), "digest": pictures.digest, "left_out": left_out}


def _against(references: PictureSet | None, training: PictureSet | None, comparison: Comparison) -> dict[str, str]:
    """need -> what it is met by, for the keys of stored values."""
    met = {"references": references.digest if references else "", "training": training.digest if training else "", "judge": "judge"}
    for name, path in comparison.weights.items():
        met[f"weights:{name}"] = weights_fingerprint(path)
    return met


def weights_fingerprint(folder: Path) -> str:
    """A short hash of a weights folder's file names, sizes and beginnings."""
    return base_files(folder) if folder.is_dir() else hashlib.sha256(folder.read_bytes()).hexdigest()[:16]


def _evidence(comparison: Comparison, studio: Studio, folders: Mapping[str, PictureFolder], references: PictureSet | None,
              training: PictureSet | None) -> dict[str, Evidence]:
    from finetune.evaluation.base_judge import BaseJudge

    prompts = [prompt for prompt in comparison.prompts for _ in comparison.seeds]
    seeds = [seed for _ in comparison.prompts for seed in comparison.seeds]
    pictures = {name: [folder.read(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)] for name, folder in folders.items()}
    kept: dict[Any, Any] = {}
    judge = BaseJudge(studio.base.family, studio.pipeline, studio.conditionings)
    base = pictures[comparison.subjects[0].name]
    return {
        name: Evidence(prompts, seeds, own, base, references.pictures if references else (), training.pictures if training else (), judge,
                       dict(comparison.weights), kept)
        for name, own in pictures.items()
    }


def _measure(folder: EvaluationFolder, comparison: Comparison, measures: Sequence[Measure], evidence: Mapping[str, Evidence], met: Mapping[str, str],
             progress: Progress) -> dict[tuple[str, str], np.ndarray]:
    """(subject, measure) -> values by picture, taken or read back."""
    stored = folder.stored_values()
    taken: dict[tuple[str, str], np.ndarray] = {}
    by_picture = [measure for measure in measures if measure.values is not None]
    with progress.phase("measuring", len(by_picture) * len(comparison.subjects)) as advance:
        for subject in comparison.subjects:
            own = evidence[subject.name]
            for measure in by_picture:
                # Every value may depend on all pictures of its subject (diversity does), so it is all or nothing.
                against = " ".join([*(met.get(need, "") for need in measure.needs), pictures_asked_for(own)])
                keys = keys_of(measure, against, subject, own)
                if all(key in stored for key in keys):
                    values = np.array([stored[key] for key in keys])
                else:
                    values = np.where(measure.applies(own), measure.values(own), np.nan)
                    weights = next((met[need] for need in measure.needs if need.startswith("weights:")), None)
                    folder.store(measure, against, subject, own, values, weights)
                taken[subject.name, measure.name] = values
                advance(1, f"{subject.name}: {measure.name}")
    return taken
