"""Which step was the best so far, and when it is no use to go on: what is measured on schedule, judged in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from finetune.training.weight_copies import WeightCopy

if TYPE_CHECKING:
    from finetune.recipe import Recipe


@dataclass(frozen=True)
class Measured:
    """What was measured after a step; None for what was not due.

    held_out_loss: on pictures that are not trained.  near_copies: share of the sample pictures that copy a training picture.
    drift: colour difference of the unrelated sample pictures to the base's.  reason: what the sample pictures say
    against going on, or None.
    """

    held_out_loss: float | None = None
    near_copies: float | None = None
    drift: float | None = None
    reason: str | None = None

    def logged(self) -> dict[str, float]:
        """For the row of the log."""
        numbers = {"held_out_loss": self.held_out_loss, "near_copies": self.near_copies, "sample_drift": self.drift}
        return {name: value for name, value in numbers.items() if value is not None}


@dataclass
class BestStep:
    """The step with the lowest held-out loss so far; without held-out pictures, the last one whose sample pictures were in order.

    patience: evaluations in a row without a lower loss after which training ends, 0 for never.  keeps: whether the
    weights of the best step are kept.  limits: settings that can end a run, with their values: a run that ended goes on
    when one of them is changed.  waited: evaluations since the best one.
    """

    patience: int
    keeps: bool
    limits: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    loss: float | None = None
    waited: int = 0
    weights: WeightCopy | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> BestStep:
        limits = {key: recipe.settings()[key] for key in ("validation.patience", "samples.stop_on_copies", "samples.most_drift")}
        return cls(recipe.validation.patience, recipe.validation.keep_best, limits)

    def judge(self, step: int, measured: Measured, parameters: Sequence[torch.nn.Parameter]) -> str | None:
        """Compare with the best so far. Returns why training should end, or None."""
        if measured.reason:
            return measured.reason
        if measured.held_out_loss is not None:
            if self.loss is None or measured.held_out_loss < self.loss:
                self._remember(step, measured.held_out_loss, parameters)
                return None
            self.waited += 1
            if self.patience and self.waited >= self.patience:
                return f"the held-out loss has not fallen for {self.waited} evaluations; it was lowest at step {self.step}: {self.loss:.4f}"
        elif self.watches_pictures and measured.near_copies is not None and self.loss is None:
            self._remember(step, None, parameters)
        return None

    @property
    def watches_pictures(self) -> bool:
        """Whether the sample pictures can end the run."""
        return bool(self.limits.get("samples.stop_on_copies")) or bool(self.limits.get("samples.most_drift"))

    def _remember(self, step: int, loss: float | None, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.step, self.loss, self.waited = step, loss, 0
        self.weights = WeightCopy(parameters) if self.keeps else None

    def as_json(self) -> dict[str, Any]:
        return {"step": self.step, "loss": self.loss, "waited": self.waited, "kept": self.weights is not None, "limits": self.limits}

    def restore(self, state: dict[str, Any], parameters: Sequence[torch.nn.Parameter]) -> None:
        """Go back to what `as_json` wrote; the kept weights are empty until they are filled from the checkpoint."""
        self.step, self.loss, self.waited = state.get("step"), state.get("loss"), state.get("waited", 0)
        self.weights = WeightCopy(parameters) if state.get("kept") and self.keeps else None

    def still_ends(self, state: dict[str, Any]) -> bool:
        """Whether the settings that can end a run are as they were when `state` was written."""
        return state.get("limits", {}) == self.limits
