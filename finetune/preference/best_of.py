"""Best-of-N: draw several, keep what the reward likes best, show all with their scores.

It needs no training and cannot damage the model: with N pictures the kept one is at most log N - (N - 1) / N nats away
from the base's own distribution. It costs N times the sampling, for ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_tools.errors import BadInput
from finetune.resampling import interval

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.preference.loaded_base import LoadedBase
    from finetune.preference.rewards.protocol import Reward

PICTURES_AT_A_TIME = 8


@dataclass(frozen=True)
class Ranked:
    """Scores in the order of the pictures; order: places from best to worst, equal scores in the given order (by seed)."""

    prompt: str
    scores: tuple[float, ...]
    order: tuple[int, ...]

    @property
    def best(self) -> int:
        """The place of the picture to keep."""
        return self.order[0]

    @property
    def gain(self) -> float:
        """Score of the kept picture minus the mean, which is what one picture would have scored on average."""
        return self.scores[self.best] - sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Gain:
    """Mean gain of best-of-N over one picture, with a 95 % interval over prompts (None with fewer than 5 prompts, or where all gained alike).
    most_nats: the largest possible divergence from the base's distribution."""

    n: int
    mean: float
    low: float | None
    high: float | None
    most_nats: float


def rank_pictures(reward: str | Path | Reward, groups: Sequence[tuple[str, Sequence[Image]]], base: LoadedBase | None = None) -> list[Ranked]:
    """Score the pictures of each (prompt, pictures) group. reward: what `load_reward` takes, or a loaded one.

    base: saves loading the base again where the reward looks at its latents or hidden states.
    """
    from finetune.preference.rewards.reward_files import load_reward

    judge = load_reward(reward, base) if isinstance(reward, str | Path) else reward
    return [_ranked(judge, prompt, pictures) for prompt, pictures in groups]


def _ranked(judge: Reward, prompt: str, pictures: Sequence[Image]) -> Ranked:
    from finetune.preference.rewards.preference_head import pixels_of

    if not pictures:
        raise BadInput("there are no pictures to choose from", where=prompt)
    scores: list[float] = []
    with torch.no_grad():
        for start in range(0, len(pictures), PICTURES_AT_A_TIME):
            part = pictures[start:start + PICTURES_AT_A_TIME]
            same_size = len({picture.size for picture in part}) == 1
            for batch in [part] if same_size else [[picture] for picture in part]:
                scores += judge.score(pixels_of(batch), [prompt] * len(batch)).tolist()
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    return Ranked(prompt, tuple(scores), tuple(order))


def gain_over_one(ranked: Sequence[Ranked]) -> Gain:
    """How much choosing helped; all groups must have the same number of pictures."""
    sizes = {len(one.scores) for one in ranked}
    if len(sizes) != 1:
        raise BadInput("the gain of best-of-N needs the same N for every prompt")
    n, gains = sizes.pop(), np.array([one.gain for one in ranked])
    drawn = np.random.default_rng(0).choice(gains, (4000, len(gains))).mean(1)
    low, high = interval(drawn, len(gains)) or (None, None)
    return Gain(n, float(gains.mean()), low, high, math.log(n) - (n - 1) / n)
