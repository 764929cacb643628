"""The one interface of everything that scores pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Reward(Protocol):
    """name: for people.  differentiable: whether gradients flow from the score to the pixels."""

    name: str
    differentiable: bool

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels (B, 3, H, W) float32 in [0, 1] -> (B,) float32, higher is better; only comparable within a prompt."""
        ...

    def description(self) -> dict[str, Any]:
        """What the reward file says; the same description scores the same."""
        ...
