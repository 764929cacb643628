"""What a resumed run may change, and going back to the newest whole checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING

from data_tools.progress import Progress
from finetune.errors import RunFolderError
from finetune.recipe import Recipe, load_recipe
from finetune.training.checkpoints import Checkpoint, newest_checkpoint, newest_step
from finetune.training.run_folder import RunFolder

if TYPE_CHECKING:
    from finetune.training.loop_state import LoopState

# Nothing here changes what a step computes (more steps do move a falling schedule, which is what is asked for then).
FREE_TO_CHANGE = ("training.steps", "training.checkpoint_every", "training.keep_checkpoints", "training.workers", "samples.")


def changed_settings(before: Recipe, now: Recipe) -> list[str]:
    """Lines "key: old -> new" of settings that shape the adapter and differ."""
    old, new = before.shaping(), now.shaping()
    return [f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if value != old.get(key) and not key.startswith(FREE_TO_CHANGE)]


def check_continuation(run: RunFolder, recipe: Recipe, data_hash: str | None, accepted: Collection[str]) -> None:
    """Raises RunFolderError naming every setting or data change that `accepted` does not allow ("data" for pictures).
    data_hash: None compares the settings alone, before the pictures are known."""
    changes = [line for line in changed_settings(load_recipe(run.recipe, of_run=True), recipe) if line.split(":")[0] not in accepted]
    if data_hash is not None and run.data_summary.exists() and "data" not in accepted:
        before = json.loads(run.data_summary.read_text(encoding="utf-8"))["data_hash"]
        changes += [] if before == data_hash else ["data: pictures, captions or sizes are not what they were"]
    if changes:
        keys = " ".join(f"--accept-change {line.split(':')[0]}" for line in changes)
        raise RunFolderError("the run was started with other settings: " + "; ".join(changes), where=str(run.path),
                             fix=f"set them back, or allow it with {keys}; the result is then no longer that of one unbroken run")


def check_not_over(run: RunFolder, state: LoopState, step: int) -> None:
    """Raises RunFolderError when the run ended early and is finished."""
    if state.ended and run.result.exists():
        raise RunFolderError(f"the run is complete: it ended at step {step}: {state.ended}", where=str(run.path),
                             fix="to go on all the same, resume with --set validation.patience=0 --accept-change validation.patience, or without the limit of the sample pictures")


def check_steps(run: RunFolder, steps: int, setting: str) -> None:
    """Raises RunFolderError when no step is left to take: the run is complete, or did more than the `steps` that are asked for.
    setting: what sets them, as a user writes it."""
    done = newest_step(run.checkpoints)
    if done is not None and done > steps:
        raise RunFolderError(f"{setting} is {steps}, and this run has done {done} steps already", where=str(run.path),
                             fix=f"to go on, set {setting} to more than {done}; for a run of {steps} steps, start a new one with --out FOLDER")
    if done == steps and run.result.exists():
        raise RunFolderError(f"the run is complete: {done} steps are done", where=str(run.path), fix=f"set {setting} to more than {done} to go on, for example {2 * done}")


def find_checkpoint(run: RunFolder, progress: Progress) -> Checkpoint | None:
    """The newest whole checkpoint, saying aloud what is passed over."""
    import torch

    checkpoint, passed_over = newest_checkpoint(run.checkpoints)
    for folder, reason in passed_over:
        progress.say(f"{folder.name} is not whole ({reason}) and is passed over")
    if checkpoint is None:
        progress.say("there is no whole checkpoint yet: starting from step 0")
        return None
    threads = checkpoint.state.get("threads")
    if threads != torch.get_num_threads():
        progress.say(f"warning: the run used {threads} threads and this process has {torch.get_num_threads()}: results may differ in the last bits "
                     f"(set OMP_NUM_THREADS={threads} for an exact resume)")
    progress.say(f"resuming after step {checkpoint.step}")
    return checkpoint
