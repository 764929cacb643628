"""What a run looks at on schedule: the loss on held-out pictures and its sample pictures, with one verdict on both."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.progress import Progress
from finetune.training.best_step import Measured
from finetune.training.held_out_loss import held_out_loss
from finetune.training.loop import TrainingJob
from finetune.training.loop_state import LoopState
from finetune.training.placement import autoencoder_there
from finetune.training.preparation import Prepared
from finetune.training.samples import BEFORE, draw_samples
from finetune.training.text_training import cached_only
from finetune.training.token_training import without_tokens

# (step, sample pictures, the base's same pictures, training pictures, which samples are without the trigger) -> a row.
SampleWatch = Callable[[int, Sequence[Path], Sequence[Path], Sequence[Path], Sequence[bool]], dict[str, Any]]


@dataclass(frozen=True)
class Looks:
    """watch_samples: judges the sample pictures, or None."""

    prepared: Prepared
    pipeline: Any
    state: LoopState
    watch_samples: SampleWatch | None
    progress: Progress

    def before_training(self, job: TrainingJob) -> None:
        """Draw with the bare base and measure its held-out loss: what everything later is compared with. Where no pictures are
        drawn on the way, the base's are drawn with the fresh base at the end, and training need not wait for them."""
        from finetune.adapters.attach import bypassed

        if self.prepared.recipe.samples.every:
            # The adapter changes nothing yet, but some kinds round on the way to nothing.
            with bypassed(self.pipeline.transformer):
                self._draw(job, 0, without_tokens(cached_only(self.prepared.encodings)))
        if job.training_set.held_out:
            self._measure_loss(job, 0)

    def after_step(self, job: TrainingJob, done: int) -> Measured:
        """What is due after `done` steps, looked at with the weights that would be exported. The last pictures are drawn by the
        proof, with the adapter as it was loaded back."""
        recipe, is_last = self.prepared.recipe, done == self.prepared.recipe.training.steps
        loss, row = None, {}
        with self.state.averaged():
            if job.training_set.held_out and (is_last or done % recipe.validation.every == 0):
                loss = self._measure_loss(job, done)
            if recipe.samples.every and done % recipe.samples.every == 0 and not is_last:
                row = self._same_in_every_process(job, self._watched(job, done))
        return Measured(loss, row.get("near_copies"), row.get("drift"), row.get("stop"))

    def _measure_loss(self, job: TrainingJob, step: int) -> float:
        loss = held_out_loss(job)
        if job.accelerator.is_main_process:
            self._note({"step": step, "held_out_loss": loss})
            self.progress.say(f"held-out loss {loss:.4f} at step {step}")
        return loss

    def _draw(self, job: TrainingJob, step: int, encodings: Any) -> list[Path]:
        """By the main process, which keeps the pictures; a divided base computes only when all processes do."""
        is_main, prepared = job.accelerator.is_main_process, self.prepared
        if not is_main and prepared.sharding is None:
            return []
        with autoencoder_there(self.pipeline, prepared.base, prepared.hold, job.accelerator.device):
            return draw_samples(prepared.samples, prepared.base.family, self.pipeline, encodings, prepared.run.samples if is_main else None, f"step-{step:06d}", self.progress)

    def _watched(self, job: TrainingJob, step: int) -> dict[str, Any]:
        """Draw, and let the watch look at the pictures beside the base's; its row is kept."""
        drawn = self._draw(job, step, self.prepared.encodings)
        if self.watch_samples is None or not job.accelerator.is_main_process:
            return {}
        before = sorted(self.prepared.run.samples.glob(f"{BEFORE}-*.png"))
        related = len(drawn) - self.prepared.samples.unrelated
        row = self.watch_samples(step, drawn, before, [picture.record.path for picture in self.prepared.training_set.own()], [index >= related for index in range(len(drawn))])
        self._note({"step": step} | row)
        return row

    def _note(self, row: dict[str, Any]) -> None:
        with open(self.prepared.run.validation, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _same_in_every_process(self, job: TrainingJob, row: dict[str, Any]) -> dict[str, Any]:
        """The main process drew; all must come to the same verdict, or some would wait for ever for one that has stopped."""
        if job.accelerator.num_processes == 1:
            return row
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([row])[0]
