"""Regularisation pictures that the untouched base draws itself, before training: what it knows already, to be kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_tools.atomic_files import write_text
from data_tools.progress import Progress
from finetune.randomness import stable_seed
from finetune.recipe import Recipe
from finetune.sampling import PictureRequest, draw, prompts_of, read_settings, save_picture
from finetune.training.encode import Encodings, encode_prompts
from finetune.training.encoding_cache import EncodingCache
from finetune.training.placement import Hold, load_held
from finetune.training.training_set import resolutions_of

if TYPE_CHECKING:
    from finetune.families.base_models import BaseModel
    from finetune.families.protocol import FamilyFacts

# What makes a picture the same one; steps and guidance of samples may change when a run goes on, and nothing is drawn anew.
IDENTITY = ("prompt", "seed", "height", "width")


def requests_of(recipe: Recipe, facts: FamilyFacts) -> list[PictureRequest]:
    """Squares of the largest training resolution, each with a seed of its own; sampler settings are those of [samples]."""
    data, samples = recipe.data, recipe.samples
    if data.regularisation_prompt is None:
        return []
    edge = max(resolutions_of(recipe, facts)) // facts.size_multiple * facts.size_multiple
    return [PictureRequest(data.regularisation_prompt, stable_seed(recipe.training.seed, "regularisation picture", 0, number), edge, edge,
                           samples.steps, samples.guidance, samples.negative) for number in range(data.regularisation_count)]


def _missing(requests: list[PictureRequest], folder: Path) -> Iterator[tuple[Path, PictureRequest]]:
    for number, request in enumerate(requests):
        path = folder / f"{number:05d}.png"
        if _identity(path) != {key: getattr(request, key) for key in IDENTITY}:
            yield path, request


def _identity(path: Path) -> dict[str, Any] | None:
    """Of a picture that is there and whole."""
    try:
        settings = read_settings(path)
    except (OSError, ValueError, SyntaxError):  # absent, or not the PNG that was written
        return None
    return {key: settings.get(key) for key in IDENTITY}


def draw_regularisation(recipe: Recipe, base: BaseModel, folder: Path, hold: Hold, text_dtype: torch.dtype, cache: EncodingCache, device: torch.device, progress: Progress) -> None:
    """Fill `folder` with the pictures that the recipe asks for, each with its caption, and no others; those that are there stay.

    A picture depends on its own seed alone, so a run that is killed here goes on to the same pictures.
    """
    requests = requests_of(recipe, base.family.facts)
    for surplus in sorted(folder.glob("*.png"))[len(requests):]:
        surplus.unlink(missing_ok=True)
    todo = list(_missing(requests, folder))
    if not todo:
        return
    prompts = prompts_of(request for _, request in todo)
    encodings = Encodings(cache, [], encode_prompts(base, prompts, cache, device, text_dtype, progress), [])
    conditionings = {prompt: encodings.conditioning(prompt) for prompt in prompts}
    pipeline = load_held(base, hold, device, cache.folder, progress)
    with progress.phase("drawing regularisation pictures", len(todo)) as advance:
        for path, request in todo:
            # One at a time: in a batch the last bits of a picture would depend on which others are still missing.
            picture, = draw(base.family, pipeline, [request], conditionings)
            # The caption first: a picture that is there has one.
            write_text(path.with_suffix(".txt"), request.prompt + "\n")
            save_picture(picture, path, vars(request) | {"family": base.family.facts.name})
            advance()
    del pipeline
    gc.collect()
