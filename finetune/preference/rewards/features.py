"""What a preference head looks at: numbers from frozen models or plain statistics, always with gradients to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.errors import BadInput

from finetune.adapters.attach import bypassed
from finetune.preference.loaded_base import LoadedBase
from finetune.preference.rewards import measures
from finetune.preference.rewards.references import check_features
from finetune.randomness import generator


class Features(Protocol):
    """Frozen features."""

    def extract(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels (B, 3, H, W) in [0, 1] -> (B, D) float32."""
        ...

    def description(self) -> dict[str, Any]:
        """What is needed to build the same features again."""
        ...


class PixelFeatures:
    """Colour by place (4 x 4 grid), spread of each channel, and the plain measures: no model at all."""

    def extract(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        grid = F.adaptive_avg_pool2d(pixels, 4).flatten(1)
        plain = torch.stack([measure(pixels) for measure in measures.PLAIN.values()], 1)
        return torch.cat([grid, pixels.flatten(2).std(2), plain, measures.gram(pixels)], 1)

    def description(self) -> dict[str, Any]:
        return {"kind": "pixels"}


class LatentFeatures:
    """The VAE's latents: mean and spread of each channel, and its mean in each quarter."""

    def __init__(self, loaded: LoadedBase):
        self.loaded = loaded

    def extract(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        latents = self.loaded.encode_pictures(pixels)
        quarters = F.adaptive_avg_pool2d(latents, 2).flatten(1)
        return torch.cat([latents.mean((2, 3)), latents.flatten(2).std(2), quarters], 1).to(pixels.device)

    def description(self) -> dict[str, Any]:
        return {"kind": "latents", "base": self.loaded.base.identifier, "revision": self.loaded.base.revision}


class TransformerFeatures:
    """Hidden states of the diffusion transformer itself, two thirds deep, at a slightly noisy latent under the prompt.

    Mean and spread over tokens. The noise is the same for every picture, so that it cancels in comparisons. An adapter
    that is being trained is left out: the judge must not move with the judged.
    """

    LEVEL, DEPTH = 0.1, 2 / 3

    def __init__(self, loaded: LoadedBase):
        from finetune.objectives import LossWeighting

        self.loaded = loaded
        self.objective = loaded.family.objective(loaded.pipeline, None, LossWeighting())

    def extract(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        loaded = self.loaded
        latents = loaded.encode_pictures(pixels)
        noise = torch.randn(latents.shape[1:], generator=generator(0, "feature noise")).to(latents).expand_as(latents)
        level = level_at(self.objective, self.LEVEL, len(latents))
        geometry = loaded.geometry(*pixels.shape[-2:])
        caught: list[Tensor] = []
        block = _block(loaded.transformer, self.DEPTH)
        hook = block.register_forward_hook(lambda module, inputs, output: caught.append(_image_states(output, len(latents))))
        try:
            with bypassed(loaded.transformer):
                noisy = self.objective.add_noise(latents, noise, level)
                loaded.family.predict(loaded.transformer, noisy, level, loaded.conditions(prompts), [geometry] * len(latents))
        finally:
            hook.remove()
        states = caught[0].float()
        return torch.cat([states.mean(1), states.std(1)], 1).to(pixels.device)

    def description(self) -> dict[str, Any]:
        return {"kind": "dit", "base": self.loaded.base.identifier, "revision": self.loaded.base.revision}


def level_at(objective: Any, sigma: float, count: int):
    """The same noise level for `count` samples: the fraction `sigma` of the axis from clean to noise."""
    from finetune.objectives import DDPMObjective, NoiseLevel

    if isinstance(objective, DDPMObjective):
        index = torch.full((count,), round(sigma * (len(objective.alphas_cumprod) - 1)))
        return NoiseLevel((1 - objective.alphas_cumprod[index]).sqrt(), index.float())
    return NoiseLevel(torch.full((count,), sigma), torch.full((count,), sigma * 1000))


def _block(transformer: torch.nn.Module, depth: float) -> torch.nn.Module:
    """The block that lies `depth` of the way through the longest list of blocks."""
    lists = [module for module in transformer.children() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise BadInput("this transformer has no list of blocks to look into", where="--features", fix="use latents or clip")
    blocks = max(lists, key=len)
    return blocks[min(len(blocks) - 1, int(len(blocks) * depth))]


def _image_states(output: Any, count: int) -> Tensor:
    """The token states in a block's output; of several streams the one with the most tokens, which is the picture's."""
    tensors = [output] if isinstance(output, Tensor) else [one for one in output if isinstance(one, Tensor)]
    return max((one for one in tensors if one.ndim == 3 and one.shape[0] == count), key=lambda one: one.shape[1])


class ClipFeatures:
    """Image embedding and its product with the text embedding, of a CLIP or SigLIP model that transformers can load.

    Preparation is done on tensors (bicubic resize, centre crop, normalisation), so gradients flow.
    """

    def __init__(self, model: str, revision: str | None = None):
        from finetune.preference.rewards.clip_model import ClipModel

        self.clip = ClipModel.load(model, revision)

    def extract(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        images, texts = self.clip.images(pixels), self.clip.texts(prompts)
        return torch.cat([images, images * texts.to(images)], 1)

    def description(self) -> dict[str, Any]:
        return {"kind": "clip", "model": self.clip.identifier, "revision": self.clip.revision}


def build_features(kind: str, *, base: str | LoadedBase | None = None, revision: str | None = None, model: str | None = None) -> Features:
    """Features by kind. Raises BadInput where the kind is unknown or what it needs is not named."""
    check_features(kind, base=base if base is None or isinstance(base, str) else base.base.identifier, model=model)
    if kind == "pixels":
        return PixelFeatures()
    if kind == "clip":
        return ClipFeatures(model, revision)
    loaded = base if isinstance(base, LoadedBase) else LoadedBase.named(base, revision)
    return LatentFeatures(loaded) if kind == "latents" else TransformerFeatures(loaded)
