"""Clipped policy gradient with advantages per prompt, on random sampler steps within a moving window.

PPO's clipped objective (Schulman et al. 2017) on denoising steps (DDPO, arXiv 2305.13301; Flow-GRPO, arXiv 2505.05470)
with MixGRPO's window (arXiv 2507.21802). Log-probabilities and divergences are means over latent elements inside the loss;
`clip_nats` is per picture and divided by their number, so that it means the same at every resolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.preference.policy.denoiser import Denoiser, Draw, Rollout, score_in_portions
from finetune.preference.policy.methods import Update, dealt, portions
from finetune.preference.policy.paths import log_probability
from finetune.preference.rewards.protocol import Reward

MOST_ADVANTAGE = 5.0
SMALLEST_SPREAD = 1e-4


@dataclass(frozen=True)
class Transition:
    """Step i of picture `sample` of the round."""

    sample: int
    i: int


class GRPO:
    """A step draws `prompts_per_round` x `group` pictures once and learns from them `updates` times."""

    def __init__(self, denoiser: Denoiser, reward: Reward, prompts: Sequence[str], settings):
        self.denoiser, self.reward, self.prompts, self.settings = denoiser, reward, list(prompts), settings
        self._numbers: dict[str, float] = {}
        self._ratios: list[float] = []

    def window(self, step: int) -> range:
        """The random steps of this round; the window wanders from noise to picture and begins again."""
        last = self.denoiser.path.steps - 1
        if self.settings.window == 0:
            return range(last)
        start = step // self.settings.window_rounds % (last - self.settings.window + 1)
        return range(start, start + self.settings.window)

    def updates(self, step: int) -> Iterator[Update]:
        settings, window = self.settings, self.window(step)
        # Within a window the pictures of a prompt share their start noise: what differs then is what the window did.
        shared = settings.window > 0
        chosen = dealt(self.prompts, settings.prompts_per_round, settings.seed, "order of prompts", step)
        draws = [Draw(prompt, number * settings.group + place, number if shared else number * settings.group + place)
                 for number, prompt in enumerate(chosen) for place in range(settings.group)]
        rollout = self.denoiser.rollout(draws, "round", step, lambda i: settings.noise if i in window else 0.0)
        pixels = self.denoiser.pixels(rollout.latents)
        rewards = score_in_portions(self.reward, pixels, [draw.prompt for draw in draws], settings.micro_batch)
        advantages, flat = group_advantages(rewards, settings.group)
        self._numbers = {"reward": float(rewards.mean()), "flat_groups": flat}
        self._ratios = []
        old = self._old_log_probabilities(rollout, window)
        for update in range(settings.updates):
            batches = [[Transition(int(sample), i) for sample in part] for i in window for part in portions(self._order(len(draws), step, update), settings.micro_batch)]
            yield Update(batches, lambda batch: self._losses(rollout, advantages, old, batch))

    def _order(self, count: int, step: int, update: int) -> list[int]:
        return dealt(list(range(count)), count, self.settings.seed, f"order of pictures {update}", step)

    @torch.no_grad()
    def _old_log_probabilities(self, rollout: Rollout, window: range) -> dict[int, Tensor]:
        """By step, (B,). Computed as the loss computes them, so that the first ratio is exactly 1."""
        found = {}
        for i in window:
            parts = [self._mean_and_log(rollout, part, i)[2] for part in portions(range(len(rollout.draws)), self.settings.micro_batch)]
            found[i] = torch.cat(parts).cpu()
        return found

    def _mean_and_log(self, rollout: Rollout, samples: Sequence[int], i: int) -> tuple[Tensor, float, Tensor]:
        places = torch.tensor(list(samples))
        x = rollout.states[i][places].to(self.denoiser.loaded.device)
        after = rollout.states[i + 1][places].to(x.device)
        output = self.denoiser.predict(x, i, [rollout.draws[place].prompt for place in samples])
        mean, std = self.denoiser.path.transition(x, output, i, self.settings.noise)
        return mean, std, log_probability(after, mean, std)

    def _losses(self, rollout: Rollout, advantages: Tensor, old: dict[int, Tensor], batch: Sequence[Transition]) -> Tensor:
        i, samples = batch[0].i, [one.sample for one in batch]
        mean, std, log = self._mean_and_log(rollout, samples, i)
        ratio = (log - old[i][samples].to(log.device)).exp()
        advantage = advantages[samples].to(log.device)
        clip = self.settings.clip_nats / mean[0].numel()
        self._ratios += ((ratio - 1).abs() > clip).float().tolist()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        if self.settings.kl_weight:
            x = rollout.states[i][samples].to(log.device)
            with torch.no_grad():
                output = self.denoiser.predict(x, i, [rollout.draws[place].prompt for place in samples], reference=True)
                reference, _ = self.denoiser.path.transition(x, output, i, self.settings.noise)
            loss = loss + self.settings.kl_weight * ((mean - reference) ** 2).flatten(1).mean(1) / (2 * std * std)
        return loss

    def numbers(self) -> dict[str, float]:
        """reward: of this round.  flat_groups: share of prompts whose pictures all scored alike.  clipped: share of
        transitions beyond the clip range; above 0.3 the learning rate is too high."""
        return {**self._numbers, "clipped": sum(self._ratios) / max(1, len(self._ratios))}


def group_advantages(rewards: Tensor, group: int) -> tuple[Tensor, float]:
    """((B,) advantages, share of flat groups): reward minus its prompt's mean, over one spread for all prompts.

    A spread per prompt would blow up tiny differences where all pictures of a prompt score alike.
    """
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    flat = float((grouped.std(1) < SMALLEST_SPREAD).float().mean())
    return (centred / (centred.pow(2).mean().sqrt() + SMALLEST_SPREAD)).clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE).flatten(), flat
