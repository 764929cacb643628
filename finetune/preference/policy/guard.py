"""Stops a run that pleases its reward and nobody else, and says which sign gave it away."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from finetune.preference.policy.drift import Check
from finetune.preference.policy.settings import PreferenceSettings

# A fall of the witness counts when it is this many standard errors deep, paired by prompt.
SURE = 2.0
# And at least this deep, in standard deviations of the base's witness within a prompt: nothing smaller can be seen.
VISIBLE = 0.1
# How far, in widths of the base's 5 to 95 % band, the mean of a plain look may lie outside the band.
LOOK_SLACK = 0.5


@dataclass
class Guard:
    """Judges checks. first: of the base.  best: the healthy check with the highest witness (or reward), whose adapter is
    kept. All of it is part of a checkpoint."""

    settings: PreferenceSettings
    look_bands: Mapping[str, tuple[float, float]]
    witness_spread: float = 0.0
    first: Check | None = None
    best: Check | None = None
    history: list[Check] = field(default_factory=list)

    def judge(self, check: Check) -> str | None:
        """The reason to stop, or None. Remembers the check."""
        self.history.append(check)
        if self.first is None:
            self.first = check
            return None
        reason = self._reason(check)
        if reason is None and (self.best is None or self.value(check) >= self.value(self.best)):
            self.best = check
        return reason

    @staticmethod
    def value(check: Check) -> float:
        """What a healthy check is chosen by: the witness, which was not optimised; else the reward."""
        return check.witness if check.witness is not None else check.reward if check.reward is not None else float(check.step)

    def _reason(self, check: Check) -> str | None:
        first, settings = self.first, self.settings
        numbers = (check.kl, check.diversity, check.drift, check.out_of_range)
        if not all(math.isfinite(number) for number in numbers):
            return "the pictures are no longer made of numbers"
        if check.kl > settings.max_kl:
            return f"the divergence from the base is {check.kl:.1f} nats, more than {settings.max_kl:g}"
        if check.diversity < settings.min_diversity * first.diversity:
            return f"pictures of one prompt became alike: variety is {check.diversity / first.diversity:.0%} of the base's"
        if check.drift > settings.max_drift * first.drift:
            return f"the base's own pictures are being forgotten: their loss is {check.drift / first.drift:.2f} times the base's"
        if check.out_of_range > first.out_of_range + settings.max_out_of_range:
            return f"{check.out_of_range:.0%} of the pixel values are no colours any more"
        return self._strange_look(check) or self._hacked(check)

    def _strange_look(self, check: Check) -> str | None:
        for name, value in check.looks.items():
            low, high = self.look_bands[name]
            slack = LOOK_SLACK * (high - low)
            if not low - slack <= value <= high + slack:
                return f"the mean {name} of {value:.2f} has left what the base draws ({low:.2f} to {high:.2f})"
        return None

    def _hacked(self, check: Check) -> str | None:
        """Reward up, witness surely down, against the check at which the witness was best."""
        if check.witness is None or check.reward is None:
            return None
        peak = max(self.history[:-1], key=lambda earlier: earlier.witness)
        falls = np.array(peak.witness_by_prompt) - np.array(check.witness_by_prompt)
        error = falls.std(ddof=1) / math.sqrt(len(falls)) if len(falls) > 1 else math.inf
        if check.reward > peak.reward and falls.mean() > max(SURE * error, VISIBLE * self.witness_spread, 1e-9):
            return f"reward hacking: the reward rose to {check.reward:.3f} while the witness fell from {peak.witness:.3f} to {check.witness:.3f} since step {peak.step}"
        return None

    def to_state(self) -> dict:
        """For a checkpoint."""
        return {"history": [check.to_record() for check in self.history], "best_step": self.best.step if self.best else None}

    def restore(self, state: dict) -> None:
        """From a checkpoint."""
        self.history = [Check(**record) for record in state["history"]]
        self.first = self.history[0] if self.history else None
        self.best = next((check for check in self.history if check.step == state["best_step"]), None)
