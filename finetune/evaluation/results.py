"""Values by picture on disk, one JSON line each, so that a long evaluation resumes and settings are never mixed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.atomic_files import write_text
from finetune.errors import BadInput
from finetune.evaluation.drawing import DrawingSettings
from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.official.imported import HEADLINE
from finetune.evaluation.subjects import Subject


class EvaluationFolder:
    """settings.json, pictures/<subject>/, values.jsonl, evaluation.json, report.html of one evaluation."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.settings = self.path / "settings.json"
        self.pictures = self.path / "pictures"
        self.values = self.path / "values.jsonl"
        self.result = self.path / "evaluation.json"
        self.report = self.path / "report.html"

    def claim(self, settings: DrawingSettings) -> None:
        """Begin or go on. Raises BadInput, naming what differs, when the folder holds an evaluation of other settings.

        More seeds, prompts, adapters or measures may be added to an evaluation; what decides how a picture looks may not change.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        mine = asdict(settings)
        if self.settings.exists():
            try:
                there = json.loads(self.settings.read_text("utf-8"))
            except (OSError, ValueError):
                raise BadInput("settings.json is damaged", where=str(self.path), fix="choose another folder with --out") from None
            differing = [key for key in mine if key != "seeds" and json.loads(json.dumps(mine[key])) != there.get(key)]
            if differing:
                raise BadInput(f"holds an evaluation with other settings: {', '.join(differing)}", where=str(self.path),
                               fix="choose another folder with --out; results of different settings are never mixed")
        elif any(self.path.iterdir()):
            raise BadInput("is neither empty nor an evaluation", where=str(self.path), fix="choose another folder with --out")
        write_text(self.settings, json.dumps(mine, ensure_ascii=False, indent=1) + "\n")

    def stored_values(self) -> dict[tuple, float]:
        """(metric id, what it was measured against, subject folder, prompt id, seed) -> value. Torn lines are passed over."""
        found: dict[tuple, float] = {}
        if not self.values.exists():
            return found
        for line in self.values.read_text("utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                key = (row["metric_id"], row["against"], row["subject"], row["prompt_id"], row["seed"])
                found[key] = float("nan") if row["value"] is None else float(row["value"])
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def store(self, measure: Measure, against: str, subject: Subject, evidence: Evidence, values: np.ndarray, weights_sha256: str | None) -> None:
        """Append the values of one measure of one subject, on disk before this returns."""
        lines = []
        for prompt, seed, value in zip(evidence.prompts, evidence.seeds, values, strict=True):
            lines.append(json.dumps({
                "v": 1, "metric": measure.name, "metric_id": measure.identifier, "against": against, "weights_sha256": weights_sha256,
                "subject": subject.folder, "adapter": subject.sha256, "scale": subject.weight, "prompt_id": prompt.prompt_id, "seed": seed,
                "value": float(value) if np.isfinite(value) else None, "imported_from": None,
            }))
        with open(self.values, "a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def imported(self) -> list[dict[str, Any]]:
        """Imported results that an earlier comparison in this folder shows, else the headline row."""
        try:
            return list(json.loads(self.result.read_text("utf-8"))["imported"])
        except (OSError, ValueError, KeyError, TypeError):
            return [asdict(result) for result in HEADLINE]

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_text(self.result, json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def pictures_asked_for(evidence: Evidence) -> str:
    """A short hash of the prompts with their words and splits, and of the seeds: other words under an old id are other pictures."""
    asked = [(prompt.prompt_id, prompt.prompt, prompt.split, seed) for prompt, seed in zip(evidence.prompts, evidence.seeds, strict=True)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def keys_of(measure: Measure, against: str, subject: Subject, evidence: Evidence) -> Sequence[tuple]:
    """The keys of `stored_values` for every picture of a subject."""
    return [(measure.identifier, against, subject.folder, prompt.prompt_id, seed) for prompt, seed in zip(evidence.prompts, evidence.seeds, strict=True)]
