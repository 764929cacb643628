"""Sample pictures of a run: which ones, and drawing them with whatever model is at hand. Same prompts, same seeds, always."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.progress import Progress
from finetune.families.protocol import FamilyFacts, ModelFamily
from finetune.recipe import Recipe
from finetune.sampling import PictureRequest, draw, save_picture
from finetune.training.caption_choice import with_trigger
from finetune.training.encode import Encodings
from finetune.training.training_set import TrainingSet

# How many captions of the data are drawn where the recipe names no prompts.
PROMPTS_FROM_DATA = 4
# Name of the base's own pictures, before the number.
BEFORE = "step-000000"


@dataclass(frozen=True)
class SamplePlan:
    """The pictures of a run. unrelated: how many of the last ones are drawn without the trigger, to watch drift."""

    requests: tuple[PictureRequest, ...]
    unrelated: int = 0

    def every_prompt(self) -> list[str]:
        """Prompts and negative prompts, to be encoded while the text encoders are loaded."""
        return list(dict.fromkeys(text for request in self.requests for text in (request.prompt, request.negative)))


def plan_samples(recipe: Recipe, facts: FamilyFacts, training_set: TrainingSet) -> SamplePlan:
    """The recipe's prompts, else the first captions of the data; sizes default to the most common bucket."""
    settings = recipe.samples
    prompts = [with_trigger(prompt, recipe.data.trigger) for prompt in settings.prompts]
    if not prompts:
        pairs = zip(training_set.pictures, training_set.captions.variants, strict=True)
        captions = dict.fromkeys(variants[0] for picture, variants in pairs if variants[0] and not picture.regularisation)
        prompts = list(captions)[:PROMPTS_FROM_DATA] or [""]
    common = Counter(picture.placement.bucket for picture in training_set.own()).most_common(1)[0][0]
    prompts = [*prompts, *settings.unrelated]
    multiple = facts.size_multiple
    height = (settings.height or common.height) // multiple * multiple or multiple
    width = (settings.width or common.width) // multiple * multiple or multiple
    return SamplePlan(tuple(
        PictureRequest(prompt=prompt, seed=settings.seed + number, height=height, width=width, steps=settings.steps, guidance=settings.guidance, negative=settings.negative)
        for number, prompt in enumerate(prompts)
    ), len(settings.unrelated))


def draw_samples(plan: SamplePlan, family: ModelFamily, pipeline: Any, encodings: Encodings, folder: Path | None, name: str, progress: Progress) -> list[Path]:
    """Draw every picture of the plan with `pipeline` as it is now, and write folder/name-00.png and so on. folder None: this
    process only computes its share of a divided base."""
    was_training = pipeline.transformer.training
    pipeline.transformer.eval()
    conditionings = {prompt: encodings.conditioning(prompt) for prompt in plan.every_prompt()}
    try:
        pictures = draw(family, pipeline, list(plan.requests), conditionings, progress=progress)
    finally:
        pipeline.transformer.train(was_training)
    paths: list[Path] = []
    if folder is None:
        return paths
    for number, (request, picture) in enumerate(zip(plan.requests, pictures, strict=True)):
        path = folder / f"{name}-{number:02d}.png"
        save_picture(picture, path, vars(request) | {"family": family.facts.name, "run_step": name})
        paths.append(path)
    return paths
