"""The base model as a judge that is always at hand: features of its encoder, and how much a prompt explains a picture.

It knows no family: everything goes through `ModelFamily`. Adapters are bypassed, so the judge is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from finetune.adapters.attach import bypassed
from finetune.evaluation.evidence import Pixels
from finetune.families.protocol import Conditioning, ModelFamily, PictureGeometry
from finetune.objectives import LossWeighting
from finetune.randomness import generator

if TYPE_CHECKING:
    from collections.abc import Callable

# Where on the noise axis a prompt is asked about: at both ends it says little.
LEVELS = (0.3, 0.5, 0.7, 0.85)


class BaseJudge:
    """pipeline: with transformer and VAE loaded.  conditionings: prompt -> Conditioning, the empty prompt included.

    on_progress: called with the number of pictures judged, since this is the long part of an evaluation on a CPU.
    """

    def __init__(self, family: ModelFamily, pipeline: Any, conditionings: Mapping[str, Conditioning], on_progress: Callable[[int], None] = lambda count: None):
        self.family, self.pipeline, self.conditionings, self._on_progress = family, pipeline, conditionings, on_progress
        self._objective = family.objective(pipeline, None, LossWeighting())
        self._device = next(pipeline.transformer.parameters()).device

    def _fitted(self, pixels: Pixels) -> Tensor:
        """(1, 3, H, W) in [-1, 1], cut at the right and bottom to the multiple that the family takes."""
        multiple = self.family.facts.size_multiple
        height, width = (max(edge // multiple * multiple, multiple) for edge in pixels.shape[:2])
        if pixels.shape[0] < multiple or pixels.shape[1] < multiple:
            from PIL import Image

            pixels = np.asarray(Image.fromarray(pixels).resize((max(width, pixels.shape[1]), max(height, pixels.shape[0]))))
        cut = torch.from_numpy(pixels[:height, :width].copy())
        return cut.permute(2, 0, 1)[None].float() / 127.5 - 1

    @torch.no_grad()
    def latents(self, pixels: Pixels) -> Tensor:
        """(1, C, h, w), the encoder's mean."""
        return self.family.encode_images(self.pipeline, self._fitted(pixels).to(self._device)).mean.float()

    def style_features(self, pictures: Sequence[Pixels]) -> np.ndarray:
        """(n, 2 * C) means and standard deviations of the latent channels over space."""
        rows = []
        for pixels in pictures:
            flat = self.latents(pixels).flatten(2)[0]
            rows.append(torch.cat([flat.mean(1), flat.std(1)]).cpu().numpy().astype(np.float64))
        return np.stack(rows)

    @torch.no_grad()
    def prompt_gain(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> np.ndarray:
        """(n,) share of the denoising error that each picture's prompt removes, averaged over `LEVELS`; the same noise for all."""
        return np.array([self._gain(pixels, prompt) for pixels, prompt in zip(pictures, prompts, strict=True)])

    def _gain(self, pixels: Pixels, prompt: str) -> float:
        one = self.latents(pixels)
        latents = one.repeat(len(LEVELS), *[1] * (one.ndim - 1))
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator(0, "alignment", index)) for index in range(len(LEVELS))]).to(latents)
        level = self._objective.level(torch.tensor(LEVELS), latents)
        noisy, target = self._objective.add_noise(latents, noise, level), self._objective.target(latents, noise, level)
        height, width = self._fitted(pixels).shape[-2:]
        geometry = [PictureGeometry((height, width), (height, width))] * len(LEVELS)
        errors = []
        with bypassed(self.pipeline.transformer):
            for text in (prompt, ""):
                predicted = self.family.predict(self.pipeline.transformer, noisy, level, [self.conditionings[text]] * len(LEVELS), geometry)
                errors.append((predicted.float() - target).pow(2).flatten(1).mean(1))
        self._on_progress(1)
        return float((1 - errors[0] / errors[1].clamp_min(1e-12)).mean())
