"""What `--reward` may say, and what is wrong with it as far as names and small files tell; nothing heavy is imported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.errors import BadInput, DataError
from data_tools.model_places import require_model
from data_tools.near_names import nearest, nearest_path
from finetune.families.base_models import refuse_unusable
from finetune.preference.rewards.ready_made import READY_MADE, ready_made

KINDS = ("measure", "clip_score", "image_reward", "sum", "preference_head")
MEASURES = ("brightness", "contrast", "saturation", "sharpness", "warmth", "clean_border", "palette", "style")
FEATURE_KINDS = ("pixels", "latents", "dit", "clip")
STYLE_NUMBERS = 45
CLIP_FIX = "give a folder or Hub id with safetensors weights, a tokenizer and a preprocessor"


def weighted_terms(text: str) -> list[tuple[float, str]] | None:
    """(weight, reference) of each term of WEIGHT*REFERENCE+WEIGHT*REFERENCE; None for a reference without weights."""
    if "*" not in text:
        return None
    terms = []
    for term in text.split("+"):
        weight, times, reference = term.strip().partition("*")
        try:
            terms.append((float(weight), reference.strip()))
        except ValueError:
            times = ""
        if not times or not terms[-1][1] or not math.isfinite(terms[-1][0]):
            raise BadInput(f"{term.strip()!r} is not WEIGHT*REWARD", where="--reward", fix="write several rewards as 0.7*reward.safetensors+0.3*measure:warmth")
    return terms


def check_measure(name: str, settings: Mapping[str, Any]) -> None:
    """Raises BadInput for a measure that does not exist or lacks what it measures against."""
    if name not in MEASURES:
        near = nearest(str(name), MEASURES)
        raise BadInput(f"the measure {name!r} is not one of {', '.join(MEASURES)}", where="reward", fix=f"did you mean measure:{near}?" if near else None)
    if name == "palette" and not settings.get("colours"):
        raise BadInput("the palette measure needs its colours", where="reward", fix='"settings": {"colours": ["#d04a2b", "#f2e6d0"]}')
    if name == "style" and len(settings.get("gram", ())) != STYLE_NUMBERS:
        raise BadInput(f"the style measure needs the {STYLE_NUMBERS} numbers of its style", where="reward")


def check_reward(reference: str | Path, where: str = "--reward") -> None:
    """Say at once what is wrong with a reference, before pictures are drawn for it. Reads no weights.

    where: the option that named it. Raises BadInput and DataError as `reward_files.load_reward`, and BadInput for a model
    that is neither here nor on the Hub.
    """
    name = str(reference)
    if (terms := weighted_terms(name)) is not None:
        for _, term in terms:
            check_reward(term, where)
    elif name.startswith("measure:"):
        check_measure(name.removeprefix("measure:"), {})
    else:
        description = ready_made(name)
        _check_models(read_description(json_of(Path(reference))) if description is None else description, f"{where} {name}")


def check_features(kind: str, *, base: str | None, model: str | None) -> None:
    """Raises BadInput where the kind of features is unknown, or what it needs is not named or not there; BaseModelError for a base that cannot be used."""
    if kind not in FEATURE_KINDS:
        near = nearest(kind, FEATURE_KINDS)
        raise BadInput(f"features {kind!r} are not one of {', '.join(FEATURE_KINDS)}", where="--features", fix=f"did you mean {near}?" if near else None)
    if kind == "clip":
        if not model:
            raise BadInput("the CLIP or SigLIP model is not named", where="--clip", fix="--clip FOLDER, or a Hub id such as google/siglip2-base-patch16-224")
        require_model(model, CLIP_FIX, where=f"--clip {model}")
    elif kind != "pixels":
        if base is None:
            raise BadInput("the base model is not named", where="--base", fix="--base mini, a folder or a Hub id")
        refuse_unusable(base)


def _check_models(description: Mapping[str, Any], where: str) -> None:
    """The models of CLIP scores, also within a sum; every other part lies beside the file and is read with it."""
    if description.get("kind") == "clip_score":
        model, revision, processor = (description.get(key) for key in ("model", "revision", "processor"))
        if not isinstance(model, str) or not all(text is None or isinstance(text, str) for text in (revision, processor)):
            raise DataError("the `model` of a clip_score is a folder or Hub id, and so is its `processor`, where it has one; a `revision` is text", where=where, fix=CLIP_FIX)
        fix = f"{CLIP_FIX}, or measure:NAME, which needs no model"
        require_model(model, fix, revision=revision, where=where)
        if processor is not None:
            require_model(processor, fix, where=where, file="preprocessor_config.json")
    parts = description.get("parts")
    for part in parts if description.get("kind") == "sum" and isinstance(parts, list) else ():
        if isinstance(part, dict):
            _check_models(part, where)


def json_of(path: Path) -> Path:
    """The description of a reward, beside its numbers."""
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path


def part_place(path: Path, reference: str) -> str | Path:
    """What a part of the sum in `path` refers to: a name, or a file beside it."""
    return reference if reference.partition(":")[0] in (*READY_MADE, "measure") else path.parent / reference


def read_description(path: Path) -> dict[str, Any]:
    """A reward file's object. Raises DataError where it is missing or of another kind."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = nearest(str(path), READY_MADE) or nearest_path(path)
        fix = f"make one with `brushwork prefer reward`, or use {', '.join(READY_MADE)} (with :FOLDER for weights at hand) or measure:NAME"
        raise DataError("no such reward file", where=str(path), fix=f"did you mean {near}?" if near else fix) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"not a reward file ({type(error).__name__})", where=str(path), fix="give the .json or .safetensors that `brushwork prefer reward` wrote") from None
    if not isinstance(description, dict) or description.get("v") != 1 or description.get("kind") not in KINDS:
        raise DataError(f"not a reward file: it needs \"v\": 1 and a kind of {', '.join(KINDS)}", where=str(path))
    return description
