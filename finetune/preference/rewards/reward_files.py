"""Reward files: JSON that describes any reward, so that `--reward FILE` means the same everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import DataError

from finetune.preference.loaded_base import LoadedBase
from finetune.preference.rewards.features import build_features
from finetune.preference.rewards.measures import Measure
from finetune.preference.rewards.preference_head import PreferenceHead
from finetune.preference.rewards.protocol import Reward
from finetune.preference.rewards.ready_made import ready_made
from finetune.preference.rewards.references import json_of, part_place, read_description, weighted_terms

HEAD_TENSORS = ("mean", "scale", "directions", "weights", "offset")


class WeightedSum:
    """Several rewards added by weight: score = sum of weight_i * reward_i. Weights carry the units."""

    def __init__(self, parts: Sequence[tuple[Reward, float]], name: str = "sum"):
        self.parts, self.name = list(parts), name
        self.differentiable = all(reward.differentiable for reward, _ in self.parts)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return sum(weight * reward.score(pixels, prompts).to(pixels.device) for reward, weight in self.parts)

    def description(self) -> dict[str, Any]:
        return {"v": 1, "kind": "sum", "parts": [{"weight": weight, **reward.description()} for reward, weight in self.parts]}


class ClipScore:
    """Agreement of picture and prompt by a CLIP or SigLIP model; with PickScore's weights, PickScore itself.

    scaled: multiply the cosine by the model's own exp(logit_scale), as PickScore does.
    """

    differentiable = True

    def __init__(self, model: str, revision: str | None = None, processor: str | None = None, scaled: bool = True):
        from finetune.preference.rewards.clip_model import ClipModel

        self.clip, self.processor, self.scaled, self.name = ClipModel.load(model, revision, processor), processor, scaled, model

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        images = self.clip.images(pixels)
        cosine = (images * self.clip.texts(prompts).to(images)).sum(1)
        return cosine * self.clip.model.logit_scale.exp().to(cosine) if self.scaled else cosine

    def description(self) -> dict[str, Any]:
        return {"v": 1, "kind": "clip_score", "model": self.clip.identifier, "revision": self.clip.revision, "processor": self.processor, "scaled": self.scaled}


def load_reward(reference: str | Path, base: LoadedBase | None = None, *, part: str = "head") -> Reward:
    """The reward that a file means, a ready-made NAME or NAME:FOLDER (see `ready_made`), measure:NAME, or several of them
    with their weights, such as 0.7*reward.safetensors+0.3*pickscore.

    base: where given, features of the same base use it instead of loading it again.  part: "head", or "witness" for the
    second head of a preference file. Raises DataError for an unreadable file, BadInput for what it asks in vain.
    """
    name = str(reference)
    if (terms := weighted_terms(name)) is not None:
        return WeightedSum([(load_reward(term, base, part=part), weight) for weight, term in terms], name)
    if (description := ready_made(name)) is not None:
        return _build(description, Path(), base, part, name)
    if name.startswith("measure:"):
        return Measure(name.removeprefix("measure:"))
    path = json_of(Path(reference))
    return _build(read_description(path), path, base, part, str(path))


def witness_of(reference: str | Path, base: LoadedBase | None = None) -> Reward | None:
    """The second head of a preference file, or None where the reward has none."""
    path = Path(reference).with_suffix(".json")
    if not path.is_file() or read_description(path).get("kind") != "preference_head":
        return None
    return load_reward(reference, base, part="witness")


def _build(description: dict[str, Any], path: Path, base: LoadedBase | None, part: str, where: str) -> Reward:
    try:
        return BUILDERS[description["kind"]](description, path, base, part)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"a field is missing or of the wrong kind ({type(error).__name__}: {error})", where=where) from None


def _measure(description: dict[str, Any], path: Path, base: LoadedBase | None, part: str) -> Reward:
    return Measure(description["measure"], description.get("target"), description.get("settings") or {})


def _clip_score(description: dict[str, Any], path: Path, base: LoadedBase | None, part: str) -> Reward:
    return ClipScore(description["model"], description.get("revision"), description.get("processor"), description.get("scaled", True))


def _image_reward(description: dict[str, Any], path: Path, base: LoadedBase | None, part: str) -> Reward:
    from finetune.preference.rewards.image_reward import ImageReward

    return ImageReward(description["model"])


def _sum(description: dict[str, Any], path: Path, base: LoadedBase | None, part: str) -> Reward:
    parts = []
    for entry in description["parts"]:
        reference = entry.get("reward")
        reward = _build(entry, path, base, part, str(path)) if reference is None else load_reward(part_place(path, reference), base, part=part)
        parts.append((reward, float(entry["weight"])))
    if not parts:
        raise ValueError("`parts` is empty")
    return WeightedSum(parts, path.stem)


def _preference_head(description: dict[str, Any], path: Path, base: LoadedBase | None, part: str) -> Reward:
    from safetensors import SafetensorError
    from safetensors.torch import load

    tensors_path = path.parent / Path(description["tensors"]).name
    try:
        content = tensors_path.read_bytes()
        stored = load(content)
    except (OSError, SafetensorError) as error:
        raise DataError(f"its numbers cannot be read ({type(error).__name__})", where=str(tensors_path), fix="keep the .safetensors beside its .json") from None
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise DataError("the numbers are not those that the .json describes", where=str(tensors_path), fix="train the reward again")
    tensors = {name: stored[f"{part}.{name}"] for name in HEAD_TENSORS}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise DataError("the numbers are not finite", where=str(tensors_path), fix="train the reward again")
    wanted = description["features"] if part == "head" else description["witness_features"]
    same = base is not None and wanted.get("base") == base.base.identifier and wanted.get("revision") == base.base.revision
    features = build_features(wanted["kind"], base=base if same else wanted.get("base"), revision=wanted.get("revision"), model=wanted.get("model"))
    return PreferenceHead(features, tensors, description.get("report"), path.stem)


BUILDERS = {"measure": _measure, "clip_score": _clip_score, "image_reward": _image_reward, "sum": _sum, "preference_head": _preference_head}
