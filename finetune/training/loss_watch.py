"""Notices a loss that blows up, before hours are spent on it."""

from __future__ import annotations

from dataclasses import dataclass

SMOOTHING = 0.9
# A single loss at one noise level varies by a factor of a few; the smoothed one does not by this much.
BLOW_UP_FACTOR = 10.0
FIRST_STEPS = 20
# No noise level makes single losses differ by this much: such a jump is a blow-up from the second step on.
SUDDEN_FACTOR = 1000.0


@dataclass
class LossWatch:
    """Smoothed loss, its lowest value after the first steps, and the lowest single loss; all are part of a checkpoint."""

    smoothed: float | None = None
    lowest: float | None = None
    lowest_single: float | None = None
    seen: int = 0
    skipped: int = 0

    def blew_up(self, loss: float) -> bool:
        """Take note of a finite loss; True when it jumps, or the smoothed loss is far above the lowest it ever was."""
        self.seen += 1
        self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        self.lowest_single = loss if self.lowest_single is None else min(self.lowest_single, loss)
        if loss > SUDDEN_FACTOR * self.lowest_single:
            return True
        if self.seen < FIRST_STEPS:
            return False
        self.lowest = self.smoothed if self.lowest is None else min(self.lowest, self.smoothed)
        return self.smoothed > BLOW_UP_FACTOR * self.lowest
