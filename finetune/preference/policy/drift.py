"""How far a policy has moved, on held-out prompts with the same random numbers at every check.

Several meters, because each alone can be fooled: reward and witness, divergence along the path, variety within a prompt,
values that are no colours, loss on the base's own pictures, plain looks (brightness, contrast, saturation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.objectives import NoiseLevel
from finetune.preference.policy.denoiser import Denoiser, Draw, score_in_portions
from finetune.preference.policy.methods import portions
from finetune.preference.policy.paths import divergence
from finetune.preference.rewards import measures
from finetune.preference.rewards.features import level_at
from finetune.preference.rewards.protocol import Reward

LOOKS = ("brightness", "contrast", "saturation")
DRIFT_LEVELS = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Check:
    """One look at the policy. reward, witness: means over held-out pictures (None without such a reward), by prompt in
    the *_by_prompt lists.  kl: nats per picture along the path; kl_steps: by sampler step.  diversity: mean distance
    within a prompt.  out_of_range: share of pixel values that are no colour.  drift: loss on the base's pictures."""

    step: int
    reward: float | None
    witness: float | None
    reward_by_prompt: list[float]
    witness_by_prompt: list[float]
    kl: float
    kl_steps: list[float]
    diversity: float
    out_of_range: float
    drift: float
    looks: dict[str, float]

    def to_record(self) -> dict:
        """As JSON."""
        return asdict(self)


class DriftMeter:
    """Measures `Check`s. The base's own pictures are drawn once, with the adapter left out."""

    def __init__(self, denoiser: Denoiser, prompts: Sequence[str], seeds: int, noise: float, reward: Reward | None, witness: Reward | None):
        self.denoiser, self.prompts, self.seeds, self.noise = denoiser, list(prompts), seeds, noise
        self.reward, self.witness = reward, witness
        self.draws = [Draw(prompt, number * seeds + place, number * seeds + place) for number, prompt in enumerate(self.prompts) for place in range(seeds)]
        self.base_latents = denoiser.rollout(self.draws, "check", 0, lambda i: noise, reference=True).latents
        pixels = denoiser.pixels(self.base_latents)
        self.look_bands = {name: tuple(np.quantile(measures.PLAIN[name](pixels.clamp(0, 1)).numpy(), (0.05, 0.95)).tolist()) for name in LOOKS}
        self.reward_spread = self._within_prompt_spread(reward, pixels)
        self.witness_spread = self._within_prompt_spread(witness, pixels)

    def _within_prompt_spread(self, reward: Reward | None, pixels: Tensor) -> float:
        """Standard deviation of the base's rewards within a prompt: the unit of reward gains."""
        if reward is None:
            return 1.0
        scores = self._scores(reward, pixels).view(-1, self.seeds)
        return float((scores - scores.mean(1, keepdim=True)).pow(2).mean().sqrt().clamp_min(1e-6))

    def _scores(self, reward: Reward, pixels: Tensor) -> Tensor:
        return score_in_portions(reward, pixels, [draw.prompt for draw in self.draws], self.denoiser.micro_batch)

    @torch.no_grad()
    def check(self, step: int) -> Check:
        """Draw the held-out pictures with the policy as it is and measure."""
        rollout = self.denoiser.rollout(self.draws, "check", 0, lambda i: self.noise)
        pixels = self.denoiser.pixels(rollout.latents)
        clamped = pixels.clamp(0, 1)
        kl_steps = self._divergences(rollout)
        by_prompt = [None if reward is None else self._scores(reward, clamped).view(-1, self.seeds).mean(1).tolist() for reward in (self.reward, self.witness)]
        means = [None if values is None else float(np.mean(values)) for values in by_prompt]
        return Check(
            step=step, reward=means[0], witness=means[1], reward_by_prompt=by_prompt[0] or [], witness_by_prompt=by_prompt[1] or [], kl=sum(kl_steps), kl_steps=kl_steps,
            diversity=self._diversity(clamped), out_of_range=float(((pixels < -0.025) | (pixels > 1.025)).float().mean()), drift=self._drift(),
            looks={name: float(measures.PLAIN[name](clamped).mean()) for name in LOOKS},
        )

    def _divergences(self, rollout) -> list[float]:
        """By random step: KL of the policy's transition from the base's, averaged over pictures."""
        found = []
        for i in range(self.denoiser.path.steps - 1):
            total = 0.0
            for part in portions(range(len(self.draws)), self.denoiser.micro_batch):
                x = rollout.states[i][list(part)].to(self.denoiser.loaded.device)
                prompts = [self.draws[place].prompt for place in part]
                means = [self.denoiser.path.transition(x, self.denoiser.predict(x, i, prompts, reference=reference), i, self.noise) for reference in (False, True)]
                total += float(divergence(means[0][0], means[1][0], means[0][1]).sum())
            found.append(total / len(self.draws))
        return found

    def _diversity(self, pixels: Tensor) -> float:
        """Mean distance between pictures of one prompt, at 16 x 16: colours and layout."""
        small = F.adaptive_avg_pool2d(pixels, 16).flatten(1).view(len(self.prompts), self.seeds, -1)
        return float(torch.stack([torch.pdist(group).mean() for group in small]).mean())

    def _drift(self) -> float:
        """Denoising loss on the base's own pictures: what was forgotten."""
        denoiser, total = self.denoiser, 0.0
        noise = denoiser.step_noise(self.draws, "drift", 0, 0)
        for part in portions(range(len(self.draws)), denoiser.micro_batch):
            places = list(part)
            clean, added = (tensor[places].to(denoiser.loaded.device) for tensor in (self.base_latents, noise))
            levels = [level_at(denoiser.objective, DRIFT_LEVELS[place % len(DRIFT_LEVELS)], 1) for place in places]
            level = NoiseLevel(torch.cat([one.sigma for one in levels]), torch.cat([one.timestep for one in levels]))
            noisy, target = denoiser.objective.add_noise(clean, added, level), denoiser.objective.target(clean, added, level)
            conditions = denoiser.loaded.conditions([self.draws[place].prompt for place in places])
            output = denoiser.loaded.family.predict(denoiser.loaded.transformer, noisy, level, conditions, [denoiser.geometry] * len(places))
            total += float((output - target).pow(2).flatten(1).mean(1).sum())
        return total / len(self.draws)
