"""Watch a run while it trains: do its sample pictures copy the training set, and do unrelated prompts drift from the base?

`training` calls this through a plain callable (`SampleWatch`), since it lies below this room and knows nothing of it.
It costs no drawing of its own: the sample pictures of the run are what is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluation.evidence import NamedPicture, Pixels
from finetune.evaluation.measures.near_copies import NearestTraining, nearest_training, training_features
from finetune.evaluation.pictures import TRAINING_EDGE
from finetune.evaluation.pixel_features import oklab

# Training stops, where it was asked to, when more than this share of the sample pictures are near-copies.
COPIED_SHARE = 0.25


class RunValidator:
    """A `SampleWatch`: after each drawing of samples it returns a row for `validation.jsonl`.

    stops: whether a run that copies its training pictures is to be ended early; the row's "stop" then says why.
    most_drift: of the unrelated samples, beyond which it is ended early as well; 0 is never.
    """

    def __init__(self, *, stops: bool = False, most_drift: float = 0.0):
        self._stops, self._most_drift = stops, most_drift
        self._features: tuple[list[NamedPicture], Any] | None = None

    def __call__(self, step: int, drawn: Sequence[Path], before: Sequence[Path], training: Sequence[Path], unrelated: Sequence[bool]) -> dict[str, Any]:
        """step: optimizer steps so far.  drawn, before: sample pictures now and of the bare base, in the same order.
        training: the training pictures' files.  unrelated: which samples were drawn without the trigger, to see drift.

        near_copies: share of the samples; nearest: largest likeness to a training picture, -1..1; drift: mean colour
        difference of the unrelated samples to the base's (as `measures.drift`), None without any.
        """
        pictures, originals = [_pixels(path) for path in drawn], [_pixels(path) for path in before]
        named, features = self._training(training)
        nearest = nearest_training(pictures, named, features)
        differences = [_difference(one, other) for one, other, is_unrelated in zip(pictures, originals, unrelated, strict=True) if is_unrelated]
        share = float(nearest.flagged.mean())
        row: dict[str, Any] = {
            "step": step, "near_copies": share, "nearest": round(float(nearest.similarity.max()), 4), "drift": round(float(np.mean(differences)), 4) if differences else None,
            "pairs": _pairs(drawn, named, nearest), "stop": None}
        if self._stops and share > COPIED_SHARE:
            row["stop"] = f"{share:.0%} of the sample pictures are near-copies of training pictures"
        elif self._most_drift and row["drift"] is not None and row["drift"] > self._most_drift:
            row["stop"] = f"pictures of unrelated prompts have drifted by {row['drift']:.3f} from the base's, more than {self._most_drift:g}"
        return row

    def _training(self, paths: Sequence[Path]) -> tuple[list[NamedPicture], Any]:
        if self._features is None:
            named = [NamedPicture(Path(path), _training_pixels(Path(path))) for path in paths]
            self._features = named, training_features(named)
        return self._features


def _pixels(path: Path) -> Pixels:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _training_pixels(path: Path) -> Pixels:
    from data_tools.images import open_image

    image = open_image(path)
    image.thumbnail((TRAINING_EDGE, TRAINING_EDGE))
    return np.asarray(image.convert("RGB"))


def _difference(one: Pixels, other: Pixels) -> float:
    return float(np.sqrt(((oklab(one) - oklab(other)) ** 2).sum(-1).mean()))


def _pairs(drawn: Sequence[Path], training: Sequence[NamedPicture], nearest: NearestTraining) -> list[dict[str, Any]]:
    return [{"picture": drawn[index].name, "training": training[nearest.index[index]].path.name, "similarity": round(float(nearest.similarity[index]), 4)}
            for index in np.flatnonzero(nearest.flagged)]
