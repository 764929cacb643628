"""How a picture comes out of noise step by step, as Gaussian transitions that can be random or not.

One path serves rollouts, losses, divergence and direct gradients. `noise` 0 is the deterministic sampler (DDIM, Euler);
above 0 a step is random with a mean and a standard deviation, so that its probability is known. The last step is always
deterministic: with almost no noise it would carry nearly all of the measured divergence and no information.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from finetune.objectives import DDPMObjective, FlowObjective, NoiseLevel, Objective, shifted_density


class SamplerPath(Protocol):
    """steps: how many.  All methods take the place `i` of a step, 0 first."""

    steps: int

    def level(self, i: int, count: int) -> NoiseLevel:
        """The level at which step i begins."""
        ...

    def transition(self, x: Tensor, output: Tensor, i: int, noise: float) -> tuple[Tensor, float]:
        """(mean of the next latents (B, C, h, w), standard deviation; 0 for a deterministic step), in float32."""
        ...

    def clean(self, x: Tensor, output: Tensor, i: int) -> Tensor:
        """The clean latents that the model believes in at step i."""
        ...


@dataclass(frozen=True)
class DDPMPath:
    """Ancestral sampling on `steps` of the training timesteps, counted from the end (trailing).

    eta = noise: 1 is DDPM, 0 DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).
    """

    objective: DDPMObjective
    steps: int

    def _alphas(self, i: int) -> tuple[float, float]:
        total = len(self.objective.alphas_cumprod)
        now, after = self._index(i), self._index(i + 1)
        return float(self.objective.alphas_cumprod[now].double()), float(self.objective.alphas_cumprod[after].double()) if 0 <= after < total else 1.0

    def _index(self, i: int) -> int:
        total = len(self.objective.alphas_cumprod)
        return round(total - i * total / self.steps) - 1

    def level(self, i: int, count: int) -> NoiseLevel:
        alpha, _ = self._alphas(i)
        return NoiseLevel(torch.full((count,), math.sqrt(1 - alpha)), torch.full((count,), float(self._index(i))))

    def clean(self, x: Tensor, output: Tensor, i: int) -> Tensor:
        return self._both(x, output, i)[0]

    def _both(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """(clean latents, noise) as the model sees them."""
        alpha, _ = self._alphas(i)
        signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)
        x, output = x.float(), output.float()
        if self.objective.prediction == "epsilon":
            return (x - sigma * output) / signal, output
        return signal * x - sigma * output, signal * output + sigma * x

    def transition(self, x: Tensor, output: Tensor, i: int, noise: float) -> tuple[Tensor, float]:
        alpha, after = self._alphas(i)
        clean, epsilon = self._both(x, output, i)
        std = 0.0 if i == self.steps - 1 else noise * math.sqrt((1 - after) / (1 - alpha) * (1 - alpha / after))
        return math.sqrt(after) * clean + math.sqrt(max(0.0, 1 - after - std * std)) * epsilon, std


@dataclass(frozen=True)
class FlowPath:
    """Euler steps of a rectified flow; random ones by the SDE with the same marginals (Flow-GRPO, arXiv 2505.05470).

    sigmas: steps + 1 levels from 1 to 0. The velocity is noise minus clean latents.
    """

    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def level(self, i: int, count: int) -> NoiseLevel:
        sigma = torch.full((count,), self.sigmas[i])
        return NoiseLevel(sigma, sigma * 1000)

    def clean(self, x: Tensor, output: Tensor, i: int) -> Tensor:
        return x.float() - self.sigmas[i] * output.float()

    def transition(self, x: Tensor, output: Tensor, i: int, noise: float) -> tuple[Tensor, float]:
        sigma, step = self.sigmas[i], self.sigmas[i + 1] - self.sigmas[i]
        x, output = x.float(), output.float()
        if noise == 0 or i == self.steps - 1:
            return x + step * output, 0.0
        # At sigma 1 the diffusion would be infinite; the next level's denominator is used there.
        std = noise * math.sqrt(sigma / (1 - (sigma if sigma < 1 else self.sigmas[i + 1])))
        drift = std * std / (2 * sigma)
        return x * (1 + drift * step) + output * (1 + drift * (1 - sigma)) * step, std * math.sqrt(-step)


def path_for(objective: Objective, steps: int, latent_shape: torch.Size) -> SamplerPath:
    """The path of a family's objective; flow levels are shifted as the family shifts them for latents (B, C, h, w)."""
    if isinstance(objective, DDPMObjective):
        return DDPMPath(objective, steps)
    if not isinstance(objective, FlowObjective):
        raise TypeError(f"no sampler path for a {type(objective).__name__}")
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    shift = objective.dynamic_shift(latent_shape) if objective.dynamic_shift else objective.sampling.shift
    return FlowPath(tuple(shifted_density(uniform, shift).tolist()))


def log_probability(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """(B,) Gaussian log-density of x, averaged over elements; constants that cancel in ratios are left out."""
    return -((x - mean) ** 2).flatten(1).mean(1) / (2 * std * std)


def divergence(mean: Tensor, reference: Tensor, std: float) -> Tensor:
    """(B,) exact KL of two Gaussians with the same std, in nats per picture."""
    return ((mean - reference) ** 2).flatten(1).sum(1) / (2 * std * std)
