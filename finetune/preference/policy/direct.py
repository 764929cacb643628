"""Gradients of the reward itself through the last sampler steps: DRaFT-K (arXiv 2309.17400) and ReFL (arXiv 2304.05977).

The fastest way up and the fastest way into nonsense, so the distance from the base's prediction is always part of the
loss, both where the reward's gradient passes and at an earlier step, which the reward never sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.preference.policy.denoiser import Denoiser, Draw
from finetune.preference.policy.methods import Update, dealt, portions
from finetune.preference.rewards.protocol import Reward
from finetune.randomness import python_random


@dataclass(frozen=True)
class DirectBatch:
    """Pictures that go through together, and the step of the run."""

    draws: Sequence[Draw]
    step: int

    def __len__(self) -> int:
        return len(self.draws)


class DirectGradient:
    """draft: the last `gradient_steps` steps carry gradients. refl: one step of the last third, and its estimate of the
    finished picture, pushed only up to `enough`. reward_scale: spread of the base's rewards, which makes weights portable."""

    def __init__(self, denoiser: Denoiser, reward: Reward, prompts: Sequence[str], settings, reward_scale: float):
        self.denoiser, self.reward, self.prompts, self.settings = denoiser, reward, list(prompts), settings
        self.reward_scale = reward_scale
        self._rewards: list[float] = []
        self._distances: list[float] = []

    def updates(self, step: int) -> Iterator[Update]:
        self._rewards, self._distances = [], []
        chosen = dealt(self.prompts, self.settings.batch_size, self.settings.seed, "order of prompts", step)
        draws = [Draw(prompt, place, place) for place, prompt in enumerate(chosen)]
        yield Update([DirectBatch(part, step) for part in portions(draws, self.settings.micro_batch)], self._losses)

    def _losses(self, batch: DirectBatch) -> Tensor:
        path, settings = self.denoiser.path, self.settings
        order = python_random(settings.seed, "direct steps", batch.step)
        first = order.randrange(max(0, path.steps * 2 // 3), path.steps) if settings.method == "refl" else path.steps - settings.gradient_steps
        earlier = order.randrange(first) if first > 0 else None
        rollout = self.denoiser.rollout(batch.draws, "direct", batch.step, lambda i: 0.0, until=first)
        prompts = [draw.prompt for draw in batch.draws]
        x, distance = rollout.latents.to(self.denoiser.loaded.device), 0.0
        steps = range(first, first + 1 if settings.method == "refl" else path.steps)
        for i in steps:
            output = self.denoiser.predict(x, i, prompts)
            distance = distance + self._distance(x, i, prompts, output) / len(steps)
            x = path.clean(x, output, i) if settings.method == "refl" else path.transition(x, output, i, 0.0)[0]
        if earlier is not None:
            before = rollout.states[earlier].to(x.device)
            distance = (distance + self._distance(before, earlier, prompts, self.denoiser.predict(before, earlier, prompts))) / 2
        pixels = self.denoiser.pixels_with_gradient(x)
        rewards = self.reward.score(pixels.clamp(0, 1), prompts).float()
        self._rewards += rewards.detach().tolist()
        self._distances += distance.detach().tolist()
        gain = rewards if settings.enough is None else rewards.clamp(max=settings.enough)
        return -gain / self.reward_scale + settings.kl_weight * distance

    def _distance(self, x: Tensor, i: int, prompts: Sequence[str], output: Tensor) -> Tensor:
        """(B,) mean squared distance of the prediction from the base's."""
        with torch.no_grad():
            reference = self.denoiser.predict(x.detach(), i, prompts, reference=True)
        return (output - reference).pow(2).flatten(1).mean(1)

    def numbers(self) -> dict[str, float]:
        """reward: of this step's pictures.  prediction_distance: squared distance from the base's prediction."""
        return {"reward": sum(self._rewards) / max(1, len(self._rewards)), "prediction_distance": sum(self._distances) / max(1, len(self._distances))}
