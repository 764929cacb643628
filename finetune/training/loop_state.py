"""What changes from step to step beside parameters and optimizer: all of it is in every checkpoint, and comes back from it exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import RunFolderError
from finetune.training.best_step import BestStep, Measured
from finetune.training.gradient_noise import NoiseScale
from finetune.training.loss_watch import LossWatch
from finetune.training.weight_copies import WeightAverage

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.training.step import StepNumbers


def copies_of_weights(recipe: Recipe, held_out: bool) -> int:
    """How many copies of the trainable weights a run keeps beside them: their average, those of the best step."""
    return int(recipe.training.ema_decay > 0) + int(recipe.validation.keep_best and (held_out or BestStep.of(recipe).watches_pictures))


@dataclass
class LoopState:
    """average: None without `training.ema_decay`.  noise: of the gradients, as far as it is measured.  ended: why training
    is over before its last step, or None."""

    parameters: Sequence[torch.nn.Parameter]
    watch: LossWatch
    best: BestStep
    average: WeightAverage | None = None
    noise: NoiseScale = field(default_factory=NoiseScale)
    ended: str | None = None

    @classmethod
    def at_start(cls, recipe: Recipe, parameters: Sequence[torch.nn.Parameter]) -> LoopState:
        """The state before the first step."""
        decay = recipe.training.ema_decay
        return cls(parameters, LossWatch(), BestStep.of(recipe), WeightAverage(parameters, decay) if decay else None)

    def took(self, numbers: StepNumbers) -> None:
        """Take note of a step; one that was left out changed nothing and does not count."""
        if self.average is not None and numbers.applied:
            self.average.update(self.parameters)
        if numbers.signal_and_noise is not None and numbers.applied:
            self.noise.take(*numbers.signal_and_noise)

    def judge(self, step: int, measured: Measured, is_last: bool) -> str | None:
        """Take note of what was measured after `step` steps. Returns why training should end before its last step, or None."""
        with self.averaged():
            reason = self.best.judge(step, measured, self.parameters)
        self.ended = None if is_last else reason
        return self.ended

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that the run draws with: the average, where there is one."""
        return self.average.in_place_of(self.parameters) if self.average is not None else nullcontext()

    @property
    def exports(self) -> str:
        """Which weights are the run's result if it ends now: "best", "average" or "parameter" (those of the last step)."""
        if self.best.weights is not None and (self.best.loss is not None or self.ended):
            return "best"
        return "average" if self.average is not None else "parameter"

    def exported(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are the run's result if it ends now."""
        return self.best.weights.in_place_of(self.parameters) if self.exports == "best" else self.averaged()

    def exported_step(self, step: int) -> int:
        """The step whose weights are the result of a run that ends after `step` steps."""
        return self.best.step if self.exports == "best" else step

    def reasons(self, step: int) -> dict[str, str]:
        """Which weights the adapter of a run of `step` steps has, where that needs saying."""
        kind = f", averaged with decay {self.average.decay:g}" if self.average is not None else ""
        if self.exports == "best":
            why = f"lowest held-out loss, {self.best.loss:.4f}" if self.best.loss is not None else "the last whose sample pictures were in order"
            return {"adapter": f"step {self.best.step} of {step}{kind}: {why}"}
        return {"adapter": f"step {step}{kind}"} if kind else {}

    def _copies(self) -> Iterator[tuple[str, list[torch.Tensor]]]:
        if self.average is not None:
            yield "average", self.average.tensors
        if self.best.weights is not None:
            yield "best", self.best.weights.tensors

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Every copy of the weights as `kind/name`, for a checkpoint."""
        return {f"{kind}/{name}": tensor.detach().cpu().clone() for kind, copies in self._copies() for name, tensor in zip(names, copies, strict=True)}

    def as_json(self) -> dict[str, Any]:
        return {"watch": asdict(self.watch), "noise": asdict(self.noise), "best": self.best.as_json(), "average_updates": self.average.updates if self.average is not None else None,
                "ended": self.ended, "exports": self.exports}

    def restore(self, names: Sequence[str], tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Go back to what `tensors` and `as_json` wrote; what this recipe no longer keeps is left behind.

        Raises RunFolderError when an average is asked for that the checkpoint does not have."""
        self.watch = LossWatch(**state["watch"])
        self.noise = NoiseScale(**state.get("noise", {}))
        self.best.restore(state.get("best") or {}, self.parameters)
        if self.average is not None:
            if state.get("average_updates") is None:
                raise RunFolderError("the checkpoint has no average of the weights", fix="resume with training.ema_decay as the run was started")
            self.average.updates = state["average_updates"]
        self.ended = state.get("ended") if self.best.still_ends(state.get("best") or {}) else None
        for kind, copies in self._copies():
            for name, held in zip(names, copies, strict=True):
                held.copy_(tensors[f"{kind}/{name}"])
