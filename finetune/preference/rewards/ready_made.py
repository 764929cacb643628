"""Published reward models by name, as the files that people would write themselves: NAME, or NAME:FOLDER for weights at hand."""

from __future__ import annotations

from typing import Any

from data_tools.errors import BadInput
from data_tools.pickle_refusal import HOW_TO_CONVERT

READY_MADE: dict[str, dict[str, Any]] = {
    "pickscore": {"v": 1, "kind": "clip_score", "model": "yuvalkirstain/PickScore_v1", "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "scaled": True},
    "clip": {"v": 1, "kind": "clip_score", "model": "openai/clip-vit-large-patch14", "scaled": False},
    "siglip": {"v": 1, "kind": "clip_score", "model": "google/siglip2-base-patch16-256", "scaled": False},
    # Published as pickles only; a converted folder is needed.
    "hpsv2": {"v": 1, "kind": "clip_score", "model": None, "scaled": False},
    "imagereward": {"v": 1, "kind": "image_reward", "model": None},
}


def ready_made(reference: str) -> dict[str, Any] | None:
    """The description that a ready-made name means, or None for any other reference.

    Raises BadInput for a name without its folder where the published weights are a pickle.
    """
    name, colon, folder = reference.partition(":")
    if name not in READY_MADE or (colon and not folder):
        return None
    description = dict(READY_MADE[name])
    if folder:
        description |= {"model": folder}
        description.pop("processor", None)
    if description["model"] is None:
        raise BadInput(f"the weights of {name} are published as a pickle, which can run code when it is opened and is never read", where=f"--reward {name}",
                       fix=f"{HOW_TO_CONVERT}: --reward {name}:FOLDER")
    return description
