"""Models that some measures need: found on this machine, never fetched, read only as safetensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from data_tools.near_names import meant_path
from finetune.errors import BadInput

# Name -> Hub id whose snapshot in the local cache is taken; None: only a folder or file that the user names.
USUAL = {
    "clip": "openai/clip-vit-large-patch14", "dino": "facebook/dinov2-base", "cmmd": "openai/clip-vit-large-patch14-336",
    "pick_score": "yuvalkirstain/PickScore_v1", "hps": None, "csd": None, "lpips": None, "image_reward": None,
}


def parse_weights(given: Iterable[str]) -> dict[str, Path]:
    """From NAME=FOLDER as the command takes it. Raises BadInput for an unknown name or a missing place."""
    found = {}
    for text in given:
        name, _, place = text.partition("=")
        if name not in USUAL or not place:
            raise BadInput(f"{text!r} names no weights", where="--weights", fix=f"write NAME=FOLDER with NAME one of {', '.join(USUAL)}")
        if not Path(place).exists():
            raise BadInput("there is nothing here", where=place, fix=meant_path(place, f"give the folder of the {name} model"))
        found[name] = Path(place)
    return found


def at_hand(given: Mapping[str, Path]) -> dict[str, Path]:
    """The given weights, and every usual model that lies complete in the Hub's local cache. Nothing is downloaded."""
    from huggingface_hub import snapshot_download

    found = dict(given)
    for name, identifier in USUAL.items():
        if name in found or identifier is None:
            continue
        try:
            folder = Path(snapshot_download(identifier, local_files_only=True))
        except (OSError, ValueError):
            continue
        if any(folder.glob("*.safetensors")):
            found[name] = folder
    return found
