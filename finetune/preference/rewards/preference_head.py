"""A reward learned from comparisons: a linear head on frozen features; safetensors for numbers, JSON for the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.atomic_files import whole_file, write_text
from data_tools.errors import BadInput
from data_tools.images import open_image
from data_tools.progress import Progress

from finetune.preference.agreement import trust
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.pairs import Pair, preference_pairs
from finetune.preference.rewards import measures
from finetune.preference.rewards.features import Features, PixelFeatures
from finetune.preference.rewards.fitting import FEW_PAIRS, Head, fit_head
from finetune.resampling import FEWEST_PROMPTS

SHORTCUTS = ("brightness", "contrast", "saturation", "size")
PICTURES_AT_A_TIME = 8


class PreferenceHead:
    """score = w . project(features), in log-odds of winning against the average candidate.

    tensors: mean (D,), scale (D,), directions (D, K), weights (K,), offset (1,), all float32.
    """

    differentiable = True

    def __init__(self, features: Features, tensors: Mapping[str, Tensor], report: Mapping[str, Any] | None = None, name: str = "preference"):
        self.features, self.tensors, self.report, self.name = features, dict(tensors), dict(report or {}), name

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        given = self.features.extract(pixels, prompts).float()
        t = {name: tensor.to(given) for name, tensor in self.tensors.items()}
        return ((given - t["mean"]) / t["scale"]) @ t["directions"] @ t["weights"] - t["offset"]

    def description(self) -> dict[str, Any]:
        return {"v": 1, "kind": "preference_head", "features": self.features.description(), "report": self.report}


@dataclass(frozen=True)
class RewardReport:
    """What `prefer reward` tells. accuracy_interval: None with too few prompts for one.  shortcut: the plain quality that would have done as well, or None.  ceiling: the
    accuracy that annotators' agreement allows, None without overlap."""

    file: Path
    pairs: int
    ties: int
    accuracy: float
    accuracy_interval: tuple[float, float] | None
    calibration_error: float
    ceiling: float | None
    shortcut: str | None
    shortcut_accuracy: float | None
    witness_accuracy: float
    warnings: tuple[str, ...]


def train_reward(folder: CandidateFolder, features: Features, out: Path, *, witness_features: Features | None = None, seed: int = 0, progress: Progress | None = None) -> RewardReport:
    """Fit a head on a folder's comparisons and write `out` (.safetensors) with a .json beside it.

    A second head on other features (the witness; plain pixel statistics unless told otherwise) is fitted and stored too:
    it is not optimised against, so that a policy which pleases only the first one is found out. Raises DataError where there are too few comparisons,
    and BadInput for a name that no reward file has.
    """
    progress = progress or Progress()
    out = out if out.suffix else out.with_suffix(".safetensors")
    if out.suffix != ".safetensors":
        raise BadInput("a reward is a .safetensors file", where=str(out), fix="name it so")
    judgements = folder.judgements()
    pairs = preference_pairs(judgements, ties=True)
    items = sorted({item for pair in pairs for item in (pair.better, pair.worse)})
    witness_features = witness_features or PixelFeatures()
    values, witness_values, shortcuts = _extract(folder, items, features, witness_features, progress)
    head = fit_head(values, pairs, seed=seed)
    witness = fit_head(witness_values, pairs, seed=seed)
    shortcut, shortcut_accuracy = best_shortcut(shortcuts, pairs)
    ceiling = trust(judgements).ceiling
    decided = sum(pair.probability == 1.0 for pair in pairs)
    warnings = _warnings(head, decided, shortcut, shortcut_accuracy, ceiling)
    held = head.held_out
    report = RewardReport(
        file=out, pairs=decided, ties=len(pairs) - decided, accuracy=held.accuracy, accuracy_interval=None if held.low is None else (held.low, held.high), calibration_error=held.calibration_error,
        ceiling=ceiling, shortcut=shortcut if warnings and "shortcut" in " ".join(warnings) else None, shortcut_accuracy=shortcut_accuracy,
        witness_accuracy=witness.held_out.accuracy, warnings=tuple(warnings),
    )
    save_head(out, head, witness, features, witness_features, report)
    return report


def _extract(folder: CandidateFolder, items: Sequence[str], features: Features, witness: Features, progress: Progress) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Features of every picture once; pictures of one size go through together."""
    by_size: dict[tuple[int, int], list[str]] = {}
    images = {}
    for item in items:
        images[item] = open_image(folder.picture(item))
        by_size.setdefault(images[item].size, []).append(item)
    values, other, plain = {}, {}, {}
    with progress.phase("features", len(items)) as advance:
        for group in by_size.values():
            for start in range(0, len(group), PICTURES_AT_A_TIME):
                names = group[start:start + PICTURES_AT_A_TIME]
                pixels = pixels_of([images[name] for name in names])
                prompts = [folder.candidates()[name].prompt for name in names]
                with torch.no_grad():
                    values |= dict(zip(names, features.extract(pixels, prompts).float().cpu().numpy(), strict=True))
                    other |= dict(zip(names, witness.extract(pixels, prompts).float().numpy(), strict=True))
                    qualities = {name: measures.PLAIN[name](pixels).tolist() for name in SHORTCUTS if name != "size"}
                for place, name in enumerate(names):
                    plain[name] = {"size": float(images[name].width * images[name].height)} | {quality: numbers[place] for quality, numbers in qualities.items()}
                advance(len(names))
    return values, other, plain


def pixels_of(images: Sequence[Any]) -> Tensor:
    """Pillow pictures of one size -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.stack([torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).copy()).permute(2, 0, 1) / 255 for image in images])


def best_shortcut(qualities: Mapping[str, Mapping[str, float]], pairs: Sequence[Pair]) -> tuple[str | None, float | None]:
    """The plain quality whose larger (or smaller) value agrees most often with the choices, and how often."""
    decided = [pair for pair in pairs if pair.probability == 1.0]
    best: tuple[str | None, float | None] = (None, None)
    for name in SHORTCUTS:
        gaps = [qualities[pair.better][name] - qualities[pair.worse][name] for pair in decided]
        if not any(gaps):
            continue
        share = float(np.mean([0.5 if gap == 0 else gap > 0 for gap in gaps]))
        if best[1] is None or max(share, 1 - share) > best[1]:
            best = (f"{'more' if share >= 0.5 else 'less'} {name}", max(share, 1 - share))
    return best


def _warnings(head: Head, decided: int, shortcut: str | None, shortcut_accuracy: float | None, ceiling: float | None) -> list[str]:
    held, found = head.held_out, []
    if decided < FEW_PAIRS:
        found.append(f"{decided} pairs are few: keep to best-of-N, or collect {FEW_PAIRS} before optimising against this reward")
    if held.low is None:
        found.append(f"{held.prompts} prompts are too few to say how far its accuracy may be off: rate pairs of {FEWEST_PROMPTS} or more")
    elif held.low <= 0.5:
        found.append(f"the interval {held.low:.0%} to {held.high:.0%} reaches chance: this reward may have learned nothing")
    if shortcut_accuracy is not None and shortcut_accuracy >= held.accuracy - 0.02 and shortcut_accuracy > 0.6:
        found.append(f"shortcut: \"{shortcut}\" alone agrees with {shortcut_accuracy:.0%} of the choices; this reward may have learned nothing else")
    if ceiling is not None and ceiling < 0.7:
        found.append(f"annotators agree so little that no reward could pass {ceiling:.0%}: make the instructions clearer first")
    return found


def _tensors(head: Head) -> dict[str, Tensor]:
    scale = np.where(np.isinf(head.projection.scale), 1e30, head.projection.scale)
    arrays = {"mean": head.projection.mean, "scale": scale, "directions": head.projection.directions, "weights": head.weights, "offset": np.array([head.offset])}
    return {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for name, array in arrays.items()}


def save_head(out: Path, head: Head, witness: Head, features: Features, witness_features: Features, report: RewardReport) -> None:
    """Two files, the JSON last: it names the other by its hash, so that a half-written pair is noticed."""
    from safetensors.torch import save_file

    tensors = {f"head.{name}": tensor for name, tensor in _tensors(head).items()} | {f"witness.{name}": tensor for name, tensor in _tensors(witness).items()}
    with whole_file(out) as temporary:
        save_file(tensors, temporary)
    description = {
        "v": 1, "kind": "preference_head", "tensors": out.name, "sha256": hashlib.sha256(out.read_bytes()).hexdigest(), "features": features.description(),
        "witness_features": witness_features.description(), "formula": "score = ((features - mean) / scale) @ directions @ weights - offset",
        "report": {**asdict(report), "file": out.name}, "held_out": asdict(head.held_out), "penalty": head.penalty,
    }
    write_text(out.with_suffix(".json"), json.dumps(description, ensure_ascii=False, indent=1))
