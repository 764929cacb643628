"""Learning rate by step: factors in [0, 1], pure functions of (step, steps, warmup), so that resume needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable

# What is left of the learning rate at the last step of a falling schedule: the last steps still move a little.
FINAL_FACTOR = 0.1


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1 - (1 - FINAL_FACTOR) * progress


def _cosine(progress: float) -> float:
    return FINAL_FACTOR + (1 - FINAL_FACTOR) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The factor for step `step` of `steps` (0-based): rises linearly over `warmup` steps, then follows `schedule`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    return SCHEDULES[schedule](min(1.0, progress))
