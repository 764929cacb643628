"""The policy: a base with a trainable LoRA, drawing along a path; and its reference, the same network without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.adapters.attach import bypassed
from finetune.objectives import Objective
from finetune.preference import latent_codec
from finetune.preference.loaded_base import LoadedBase
from finetune.preference.policy.paths import SamplerPath
from finetune.randomness import generator


@dataclass(frozen=True)
class Draw:
    """One picture to draw: its words, and the index that names its random numbers."""

    prompt: str
    index: int
    noise_index: int


@dataclass
class Rollout:
    """states[i]: latents before step i, states[-1] the finished ones; (B, C, h, w) float32 on the CPU."""

    draws: list[Draw]
    states: list[Tensor]

    @property
    def latents(self) -> Tensor:
        return self.states[-1]


class Denoiser:
    """Predictions of policy and reference at the same settings; one size for the whole run."""

    def __init__(self, loaded: LoadedBase, objective: Objective, path: SamplerPath, *, height: int, width: int, guidance: float, seed: int, micro_batch: int):
        self.loaded, self.objective, self.path = loaded, objective, path
        self.shape = loaded.latent_shape(height, width)
        self.geometry = loaded.geometry(height, width)
        self.guidance, self.seed, self.micro_batch = guidance, seed, micro_batch

    def predict(self, x: Tensor, i: int, prompts: Sequence[str], *, reference: bool = False) -> Tensor:
        """Output at step i for latents x (B, C, h, w); the branch without words carries no gradient."""
        loaded = self.loaded
        x = x.to(loaded.device)
        level, geometries = self.path.level(i, len(x)), [self.geometry] * len(x)
        with loaded.autocast(), bypassed(loaded.transformer) if reference else nullcontext():
            output = loaded.family.predict(loaded.transformer, x, level, loaded.conditions(prompts), geometries)
            if self.guidance == 1.0:
                return output
            with torch.no_grad():
                empty = loaded.family.predict(loaded.transformer, x, level, loaded.conditions([""] * len(x)), geometries)
        return empty + self.guidance * (output - empty)

    def start(self, draws: Sequence[Draw], purpose: str, step: int) -> Tensor:
        """Start noise (B, C, h, w); equal `noise_index` gives equal noise."""
        return torch.stack([torch.randn(self.shape, generator=generator(self.seed, f"{purpose} start", step, draw.noise_index)) for draw in draws])

    def step_noise(self, draws: Sequence[Draw], purpose: str, step: int, i: int) -> Tensor:
        """Noise of the random step i."""
        return torch.stack([torch.randn(self.shape, generator=generator(self.seed, f"{purpose} step {i}", step, draw.index)) for draw in draws])

    @torch.no_grad()
    def rollout(self, draws: Sequence[Draw], purpose: str, step: int, noise_at: Callable[[int], float], *, until: int | None = None, reference: bool = False) -> Rollout:
        """Draw without gradients. noise_at(i): randomness of step i.  until: stop before that step."""
        parts = [self._rollout(draws[start:start + self.micro_batch], purpose, step, noise_at, until, reference) for start in range(0, len(draws), self.micro_batch)]
        return Rollout(list(draws), [torch.cat(states) for states in zip(*(part.states for part in parts), strict=True)])

    def _rollout(self, draws: Sequence[Draw], purpose: str, step: int, noise_at: Callable[[int], float], until: int | None, reference: bool) -> Rollout:
        x = self.start(draws, purpose, step)
        states, prompts = [x], [draw.prompt for draw in draws]
        for i in range(self.path.steps if until is None else until):
            on_device = x.to(self.loaded.device)
            mean, std = self.path.transition(on_device, self.predict(on_device, i, prompts, reference=reference), i, noise_at(i))
            x = mean.cpu()
            if std:
                x = x + std * self.step_noise(draws, purpose, step, i)
            states.append(x)
        return Rollout(list(draws), states)

    def pixels(self, latents: Tensor) -> Tensor:
        """Finished latents -> pixels (B, 3, H, W) on the CPU, not clamped, without gradients."""
        return self.loaded.decode(latents).cpu()

    def pixels_with_gradient(self, latents: Tensor) -> Tensor:
        """As `pixels`, on the device, with gradients to the latents."""
        return latent_codec.decode(self.loaded.pipeline.vae, latents)


def score_in_portions(reward: Any, pixels: Tensor, prompts: Sequence[str], size: int) -> Tensor:
    """(B,) scores of pixels clamped to valid colours; without gradients."""
    with torch.no_grad():
        parts = [reward.score(pixels[start:start + size].clamp(0, 1), prompts[start:start + size]).float().cpu() for start in range(0, len(pixels), size)]
    return torch.cat(parts)
