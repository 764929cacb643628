"""Pictures from a pipeline whose prompts are already encoded. Takes no path of a run and no recipe.

Every request has its own seed, so a picture does not depend on what else is drawn beside it.
"""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_tools.atomic_files import whole_file
from data_tools.progress import Progress
from finetune import randomness
from finetune.errors import BadInput
from finetune.families.image_encoding import tiled
from finetune.families.picture_limits import NO_LIMITS, check_size
from finetune.offload import working_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from finetune.families.protocol import Conditioning, ModelFamily, PictureLimits

SETTINGS_KEY = "brushwork"


@dataclass(frozen=True)
class PictureRequest:
    """One picture to draw. height, width: pixels, multiples of the family's size.  steps: denoising steps.

    guidance: classifier-free guidance scale, 1 is none.  seed: names the initial noise.
    """

    prompt: str
    seed: int
    height: int
    width: int
    steps: int = 30
    guidance: float = 5.0
    negative: str = ""


def encode_all(family: ModelFamily, pipeline: Any, prompts: Iterable[str]) -> dict[str, Conditioning]:
    """Each different prompt encoded once. Needs the part "text"."""
    unique = list(dict.fromkeys(prompts))
    return dict(zip(unique, family.encode_prompts(pipeline, unique), strict=True))


def prompts_of(requests: Iterable[PictureRequest]) -> list[str]:
    """Every text that `draw` needs encoded for these requests: prompts and negatives, each once."""
    return list(dict.fromkeys(text for request in requests for text in (request.prompt, request.negative)))


def initial_latents(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise that a picture begins with: float32 of `shape` (C, h, w), a function of the seed alone."""
    return torch.randn(tuple(shape), generator=randomness.generator(seed, "initial latents"))


def draw(family: ModelFamily, pipeline: Any, requests: Sequence[PictureRequest], conditionings: Mapping[str, Conditioning], *,
         batch_size: int = 8, progress: Progress | None = None, latents: Sequence[Tensor] | None = None,
         output_type: str = "pil", on_step: Callable[[int], None] | None = None, on_picture: Callable[[int, Any], None] | None = None) -> list[Any]:
    """Pictures in the order of `requests`, by the pipeline's own call. Needs the parts "transformer" and "vae".

    conditionings: from `encode_all(prompts_of(requests))`.  latents: initial noise (C, h, w) for each request, else from
    its seed.  output_type: "pil" pictures or "pt" tensors (3, H, W) in [0, 1].
    on_step: called with the number of pictures in flight after each denoising step, where the pipeline can.
    on_picture: called with the place in `requests` and the picture as soon as it is there, batch by batch.
    Raises BadInput for a size that the model cannot draw or a prompt that was not encoded.
    """
    limits = family.facts.limits(pipeline.transformer.config) if family.facts.limits else NO_LIMITS
    for request in requests:
        check_request(family, request, limits)
        for text in (request.prompt, request.negative):
            if text not in conditionings:
                raise BadInput(f"the prompt {text!r} was not encoded", fix="encode every prompt and negative prompt first")
    drawn: list[Any] = [None] * len(requests)
    device = working_device(pipeline.transformer)
    was_training = pipeline.transformer.training
    pipeline.transformer.eval()
    pipeline.set_progress_bar_config(disable=True)
    try:
        with solver(pipeline), torch.no_grad(), (progress or Progress()).phase("drawing", len(requests)) as advance:
            for batch in _batches(family, requests, conditionings, batch_size):
                chosen = [requests[index] for index in batch]
                noise = [latents[index] if latents is not None else initial_latents(r.seed, family.latent_shape(pipeline, r.height, r.width))
                         for index, r in zip(batch, chosen, strict=True)]
                pictures = _draw_batch(family, pipeline, chosen, conditionings, torch.stack(noise).to(device), output_type, on_step)
                for index, picture in zip(batch, pictures, strict=True):
                    drawn[index] = picture
                    if on_picture is not None:
                        on_picture(index, picture)
                advance(len(batch))
    finally:
        pipeline.transformer.train(was_training)
    return drawn


def check_request(family: ModelFamily, request: PictureRequest, limits: PictureLimits) -> None:
    """Raises BadInput for a size or a number of steps with which a base of this family cannot draw. limits: of the base."""
    multiple = family.facts.size_multiple
    if request.height % multiple or request.width % multiple or min(request.height, request.width) < multiple:
        raise BadInput(f"{request.width}x{request.height} cannot be drawn", fix=f"width and height must be multiples of {multiple}")
    if request.steps < 1:
        raise BadInput(f"{request.steps} denoising steps make no picture", fix="ask for at least 1")
    check_size(request.height, request.width, limits)


def _batches(family: ModelFamily, requests: Sequence[PictureRequest], conditionings: Mapping[str, Conditioning], size: int) -> Iterator[list[int]]:
    """Indices of requests that one call can draw: same size, steps and guidance, and text length where that matters."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        lengths = tuple(tuple(t.shape) for text in (request.prompt, request.negative) for t in conditionings[text].tensors.values())
        key = (request.height, request.width, request.steps, request.guidance, lengths if family.facts.equal_text_lengths else None)
        alike[key].append(index)
    for indices in alike.values():
        for start in range(0, len(indices), max(1, size)):
            yield indices[start : start + max(1, size)]


def _draw_batch(family: ModelFamily, pipeline: Any, requests: Sequence[PictureRequest], conditionings: Mapping[str, Conditioning],
                noise: Tensor, output_type: str, on_step: Callable[[int], None] | None) -> list[Any]:
    first = requests[0]
    inputs = family.pipeline_inputs(
        pipeline, [conditionings[r.prompt] for r in requests], [conditionings[r.negative] for r in requests], noise, first.guidance)
    if on_step is not None and "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:
        def after(_pipeline: Any, _step: int, _timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            on_step(len(requests))
            return kept

        inputs["callback_on_step_end"] = after
    # Samplers that draw noise on the way get one generator a picture, for the same independence.
    generators = [randomness.generator(r.seed, "sampler noise") for r in requests]
    with tiled(pipeline.vae, first.height, first.width):
        output = pipeline(height=first.height, width=first.width, num_inference_steps=first.steps, generator=generators,
                          output_type=output_type, **inputs)
    pictures = getattr(output, "images", None)
    if pictures is None:
        pictures = [frames[0] for frames in output.frames]
    return list(pictures)


@contextmanager
def solver(pipeline: Any) -> Iterator[None]:
    """DPM-Solver++ 2M in place of a discrete-time DDPM scheduler (30 steps do what 100 did); others stay as shipped."""
    from diffusers import DPMSolverMultistepScheduler

    shipped = pipeline.scheduler
    config = shipped.config
    if "beta_schedule" in config and not config.get("use_flow_sigmas") and config.get("prediction_type") in ("epsilon", "v_prediction"):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
    else:
        pipeline.scheduler = type(shipped).from_config(config)
    try:
        yield
    finally:
        pipeline.scheduler = shipped


def save_picture(image: Image, path: Path | str, settings: Mapping[str, Any]) -> None:
    """Write a PNG, whole or not at all, with the settings that made it as JSON in a text chunk."""
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    information.add_itxt(SETTINGS_KEY, json.dumps(dict(settings), ensure_ascii=False, sort_keys=True, default=str))
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=information)


def read_settings(path: Path | str) -> dict[str, Any]:
    """The settings that `save_picture` stored; empty for other pictures."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return json.loads(image.info.get(SETTINGS_KEY, "{}"))
