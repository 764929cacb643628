"""Notices a loss that blows up, before hours are spent on it."""

from __future__ import annotations

from dataclasses import dataclass

SMOOTHING = 0.9
# A single loss at one noise level varies by a factor of a few; the smoothed one does not by this much.
BLOW_UP_FACTOR = 10.0
FIRST_STEPS = 20


@dataclass
class LossWatch:
    """Smoothed loss and its lowest value so far; both are part of a checkpoint."""

    smoothed: float | None = None
    lowest: float | None = None
    seen: int = 0
    skipped: int = 0

    def blew_up(self, loss: float) -> bool:
        """Take note of a finite loss; True when the smoothed loss is far above the lowest it ever was."""
        self.seen += 1
        self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        if self.seen < FIRST_STEPS:
            return False
        self.lowest = self.smoothed if self.lowest is None else min(self.lowest, self.smoothed)
        return self.smoothed > BLOW_UP_FACTOR * self.lowest
