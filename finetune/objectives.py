"""What the model learns to predict: noise added to a latent, the target, the weight of the loss.

Two objectives cover every family here. Both are plain data plus arithmetic, so that training and its tests share one
definition and the loop has no branch for either.

Shapes: latents, noise and targets are (B, C, h, w) float32; everything named "level" is (B,) float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from finetune.errors import BadInput


@dataclass(frozen=True)
class NoiseLevel:
    """How noisy each sample is.

    sigma: (B,) noise fraction in [0, 1] (flow matching; for DDPM sqrt(1 - alpha_bar)).
    timestep: (B,) on the 0..1000 axis that models are told (1000 * sigma for flow, the integer index for DDPM).
    guidance: scale of the guidance that guidance-distilled models are told beside it; others are told none.
    """

    sigma: Tensor
    timestep: Tensor
    guidance: float = 1.0


class Objective(Protocol):
    """Noise to add, target to hit, weight of the loss."""

    def level(self, uniform: Tensor, latents: Tensor) -> NoiseLevel:
        """Noise levels from numbers in [0, 1) of shape (B,); may look at the shape of `latents` (dynamic shift)."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The noisy latents that the model sees."""
        ...

    def target(self, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """What `ModelFamily.predict` should have returned."""
        ...

    def weight(self, level: NoiseLevel) -> Tensor:
        """(B,) factors on each sample's mean squared error."""
        ...


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, torch.float32).view(-1, *[1] * (like.ndim - 1))


def uniform_density(u: Tensor) -> Tensor:
    """Every noise level equally often."""
    return u


def logit_normal_density(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid of a normal variable: middle levels more often (Stable Diffusion 3 paper, section 3.1)."""
    normal = torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6)) * std + mean
    return torch.sigmoid(normal).to(u.dtype)


def shifted_density(u: Tensor, shift: float) -> Tensor:
    """s u / (1 + (s - 1) u): more high noise for s > 1 (Stable Diffusion 3 paper, section 5.3.2)."""
    # Rounding may lift the end of the interval above 1 by one unit of the last place.
    return (shift * u / (1 + (shift - 1) * u)).clamp(max=1.0)


@dataclass(frozen=True)
class TimestepSampling:
    """The density of noise levels as data: `kind` is one of uniform, logit_normal, shifted, logit_normal_shifted."""

    kind: str = "uniform"
    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor, shift: float | None = None) -> Tensor:
        """Numbers in [0, 1) with this density, from uniform numbers in [0, 1). `shift` overrides the stored one."""
        shift = self.shift if shift is None else shift
        return DENSITIES[self.kind](u, self, shift)


DENSITIES: dict[str, Callable[[Tensor, TimestepSampling, float], Tensor]] = {
    "uniform": lambda u, s, shift: uniform_density(u),
    "logit_normal": lambda u, s, shift: logit_normal_density(u, s.mean, s.std),
    "shifted": lambda u, s, shift: shifted_density(u, shift),
    "logit_normal_shifted": lambda u, s, shift: shifted_density(logit_normal_density(u, s.mean, s.std), shift),
}


@dataclass(frozen=True)
class LossWeighting:
    """Weights by noise level as data: `kind` is none or min_snr, `gamma` the cap of min-SNR."""

    kind: str = "none"
    gamma: float = 5.0


def snr_weight(snr: Tensor, weighting: LossWeighting, prediction: str) -> Tensor:
    """Min-SNR-gamma weights (Hang et al. 2023, arXiv 2303.09556).

    The paper weighs the x0 error by min(snr, gamma). In terms of the model's own output that is divided by snr for
    epsilon, by snr + 1 for v, and by (1 + sqrt(snr))^2 for a velocity, since x0 - x0_hat = sigma (v_hat - v) there.
    """
    if weighting.kind == "none":
        return torch.ones_like(snr)
    capped = snr.clamp(max=weighting.gamma)
    return capped / SNR_DIVISORS[prediction](snr)


SNR_DIVISORS: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "velocity": lambda snr: (1 + snr.sqrt()) ** 2,
}


@dataclass(frozen=True)
class DDPMObjective:
    """Denoising diffusion with discrete steps (Ho et al. 2020); `prediction` is epsilon or v_prediction.

    alphas_cumprod: (T,) float32, from the base's own scheduler configuration.
    """

    alphas_cumprod: Tensor
    prediction: str
    sampling: TimestepSampling = field(default_factory=TimestepSampling)
    weighting: LossWeighting = field(default_factory=LossWeighting)

    def level(self, uniform: Tensor, latents: Tensor) -> NoiseLevel:
        steps = len(self.alphas_cumprod)
        index = (self.sampling(uniform) * steps).long().clamp(0, steps - 1)
        return NoiseLevel(sigma=(1 - self._alpha(index)).sqrt(), timestep=index.float())

    def _alpha(self, index: Tensor) -> Tensor:
        return self.alphas_cumprod[index.long().cpu()].float()

    def _coefficients(self, level: NoiseLevel, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alpha(level.timestep)
        return _per_sample(alpha.sqrt(), like), _per_sample((1 - alpha).sqrt(), like)

    def add_noise(self, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        signal, sigma = self._coefficients(level, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        # v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, arXiv 2202.00512)
        signal, sigma = self._coefficients(level, latents)
        return signal * noise - sigma * latents

    def weight(self, level: NoiseLevel) -> Tensor:
        alpha = self._alpha(level.timestep)
        return snr_weight(alpha / (1 - alpha), self.weighting, self.prediction)


@dataclass(frozen=True)
class FlowObjective:
    """Rectified flow (Liu et al. 2022): x_s = (1 - s) x0 + s noise, velocity = noise - x0.

    dynamic_shift: where a family shifts by resolution, a function of the latents' shape; else None.
    guidance: scale that a guidance-distilled model is told.
    """

    sampling: TimestepSampling = field(default_factory=TimestepSampling)
    weighting: LossWeighting = field(default_factory=LossWeighting)
    dynamic_shift: Callable[[torch.Size], float] | None = None
    guidance: float = 1.0

    def level(self, uniform: Tensor, latents: Tensor) -> NoiseLevel:
        shift = self.dynamic_shift(latents.shape) if self.dynamic_shift else None
        sigma = self.sampling(uniform, shift).clamp(1e-4, 1.0)
        return NoiseLevel(sigma=sigma, timestep=sigma * 1000, guidance=self.guidance)

    def add_noise(self, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        sigma = _per_sample(level.sigma, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return noise - latents

    def weight(self, level: NoiseLevel) -> Tensor:
        return snr_weight(((1 - level.sigma) / level.sigma) ** 2, self.weighting, "velocity")


def refuse_noise_offset(objective: Objective) -> None:
    """Raise BadInput for an objective that `objective.noise_offset` only harms.

    An offset mends that a DDPM schedule ends before pure noise, so that the model learns to read the mean of a picture from
    its noisiest state, while sampling starts from noise whose mean is zero. Flow matching is trained on pure noise: there is
    nothing to mend, and noise with an offset would only be other noise than that which sampling starts from.
    """
    if isinstance(objective, FlowObjective):
        raise BadInput("a noise offset does not go with this base: it is a flow matching model, which learns from pure noise as it is", where="objective.noise_offset",
                       fix="set objective.noise_offset = 0; for more weight on the highest noise, raise objective.shift")


def with_guidance(objective: Objective, guidance: float) -> Objective:
    """The objective that tells the model this scale of guidance. Only flow matching models are guidance-distilled."""
    return replace(objective, guidance=guidance) if isinstance(objective, FlowObjective) else objective


def resolution_shift(tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """exp(mu), mu linear in the number of image tokens (black-forest-labs/flux, `src/flux/sampling.py`)."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (tokens - base_tokens))
