"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908): from comparisons, without a reward model and without drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.adapters.attach import bypassed
from finetune.preference.loaded_base import LoadedBase
from finetune.preference.pairs import Pair
from finetune.preference.policy.methods import Update, dealt, portions
from finetune.randomness import generator


@dataclass(frozen=True)
class NoisyPair:
    """A pair with its place in the step, which names its noise and noise level."""

    pair: Pair
    step: int
    place: int


class DiffusionDPO:
    """loss = -log sigmoid(-beta/2 ((e_better - e_worse) - (the same of the reference))), e = mean squared error of the
    prediction at the same noise and level for both; ties with target probability 1/2.

    latents: candidate id -> (C, h, w) on the CPU; both of a pair have one shape.
    """

    def __init__(self, loaded: LoadedBase, objective, pairs: Sequence[Pair], latents: Mapping[str, Tensor], *, beta: float, batch_size: int, micro_batch: int, seed: int):
        self.loaded, self.objective, self.latents = loaded, objective, latents
        self.pairs, self.beta, self.batch_size, self.micro_batch, self.seed = list(pairs), beta, batch_size, micro_batch, seed
        self._right, self._error = [], []

    def updates(self, step: int) -> Iterator[Update]:
        self._right, self._error = [], []
        chosen = [NoisyPair(pair, step, place) for place, pair in enumerate(dealt(self.pairs, self.batch_size, self.seed, "order of pairs", step))]
        by_shape: dict[torch.Size, list[NoisyPair]] = {}
        for one in chosen:
            by_shape.setdefault(self.latents[one.pair.better].shape, []).append(one)
        yield Update([part for group in by_shape.values() for part in portions(group, max(1, self.micro_batch // 2))], self.losses)

    def losses(self, batch: Sequence[NoisyPair]) -> Tensor:
        """(B,) losses of the pairs."""
        device, step = self.loaded.device, batch[0].step
        clean = torch.stack([self.latents[one.pair.better] for one in batch] + [self.latents[one.pair.worse] for one in batch]).to(device)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator(self.seed, "pair noise", step, one.place)) for one in batch]).to(device).repeat(2, 1, 1, 1)
        level = self.objective.level(self._uniform(batch).repeat(2), clean)
        noisy, target = self.objective.add_noise(clean, noise, level), self.objective.target(clean, noise, level)
        prompts = [one.pair.prompt for one in batch] * 2
        factor = self.loaded.pipeline.vae_scale_factor if hasattr(self.loaded.pipeline, "vae_scale_factor") else 8
        geometries = [self.loaded.geometry(clean.shape[-2] * factor, clean.shape[-1] * factor)] * len(clean)

        def errors() -> Tensor:
            output = self.loaded.family.predict(self.loaded.transformer, noisy, level, self.loaded.conditions(prompts), geometries)
            return (output - target).pow(2).flatten(1).mean(1)

        with torch.no_grad(), bypassed(self.loaded.transformer):
            reference_better, reference_worse = errors().chunk(2)
        better, worse = errors().chunk(2)
        margin = -0.5 * self.beta * ((better - worse) - (reference_better - reference_worse))
        probability = torch.tensor([one.pair.probability for one in batch], device=device)
        weight = torch.tensor([one.pair.weight for one in batch], device=device)
        self._right += torch.where(margin == 0, 0.5, (margin > 0).float())[probability != 0.5].tolist()
        self._error += (better.detach() - reference_better).tolist()
        return weight * (probability * F.softplus(-margin) + (1 - probability) * F.softplus(margin))

    def _uniform(self, batch: Sequence[NoisyPair]) -> Tensor:
        """Levels spread evenly over a step's pairs, so that steps are comparable."""
        inside = torch.cat([torch.rand(1, generator=generator(self.seed, "pair level", one.step, one.place)) for one in batch])
        strata = torch.randperm(self.batch_size, generator=generator(self.seed, "pair level order", batch[0].step))
        return (strata[[one.place for one in batch]] + inside) / self.batch_size

    def numbers(self) -> dict[str, float]:
        """pairs_right: share of the decided pairs that the adapter ranks right (0.5 is chance, and where it begins).  better_error: change of the preferred
        picture's own error; when it rises for long, the adapter forgets instead of learning."""
        right = {"pairs_right": sum(self._right) / len(self._right)} if self._right else {}
        return {**right, "better_error": sum(self._error) / max(1, len(self._error))}
