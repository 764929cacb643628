"""What a pipeline's `model_index.json` says, read without the libraries that load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import BaseModelError

PARTS = frozenset({"text", "vae", "transformer"})
# Components without weights: they are always there.
LIGHT_SLOTS = frozenset({"scheduler", "guider", "ocr_guider"})


def part_of(slot: str) -> str | None:
    """Which part a slot of `model_index.json` belongs to: text, vae, transformer, light; None is never loaded."""
    if slot.startswith(("text_encoder", "tokenizer")):
        return "text"
    if slot in LIGHT_SLOTS:
        return "light"
    return slot if slot in PARTS else None


def read_model_index(folder: Path) -> dict[str, Any]:
    """The pipeline's `model_index.json`. Raises BaseModelError where there is none or it is not one."""
    path = Path(folder) / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            "there is no model_index.json in this folder, so it is not a diffusers pipeline", where=str(folder),
            fix="give the folder that holds model_index.json, a Hub id, or mini",
        ) from None
    except (OSError, ValueError) as error:
        raise BaseModelError(f"model_index.json cannot be read: {error}", where=str(path)) from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise BaseModelError("model_index.json names no pipeline class", where=str(path))
    return index


def component_slots(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """slot -> (library, class) of the components that the pipeline really has."""
    return {
        slot: (value[0], value[1]) for slot, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
    }
