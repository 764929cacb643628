"""Experiment trackers through accelerate: TensorBoard files in the run folder, Weights & Biases, Trackio."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import BadInput
from finetune.recipe import Recipe
from finetune.training.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

# What is told of a recipe: what shapes the adapter. Not the folders, prompts and names, which may be private.
TOLD = ("adapter.", "training.", "objective.", "data.resolution", "data.buckets", "data.caption_dropout", "validation.share", "validation.every")


def check_trackers(recipe: Recipe) -> None:
    """Raises BadInput when a tracker that the recipe names is not installed."""
    for name in recipe.tracking.trackers:
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"the tracker {name} is not installed", where="tracking.trackers", fix=f'pip install -c constraints.txt ".[{name}]", or leave it out')


def accelerator_arguments(recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """For `Accelerator`: which trackers, and where those that write files put them."""
    if not recipe.tracking.trackers:
        return {}
    from accelerate.utils import ProjectConfiguration

    return {"log_with": list(recipe.tracking.trackers), "project_config": ProjectConfiguration(str(run.path), str(run.path / "tracking"))}


def start_trackers(accelerator: Accelerator, recipe: Recipe, run: RunFolder, start: int) -> None:
    """Open the run at its trackers; one that goes on after `start` steps goes on there too. Raises BadInput when a tracker refuses."""
    if not recipe.tracking.trackers:
        return
    unknown = set(recipe.tracking.trackers) - {str(tracker) for tracker in accelerator.log_with}
    if unknown:
        raise BadInput(f"accelerate cannot use the tracker {', '.join(sorted(unknown))} here", where="tracking.trackers", fix="install it again, or leave it out")
    name = recipe.tracking.run_name or run.path.resolve().name
    arguments = {
        # Steps that were logged and are taken again are hidden by TensorBoard itself.
        "tensorboard": {"purge_step": start + 1},
        "wandb": {"name": name, "id": _identity(accelerator, run), "resume": "allow", "dir": str(run.path)},
        "trackio": {"name": name, "resume": "allow"},
    }
    told = {key: value for key, value in recipe.settings().items() if key.startswith(TOLD) and isinstance(value, int | float | str)}
    told["base.model"] = Path(recipe.base.model).name
    try:
        accelerator.init_trackers(recipe.tracking.project, None if start else told, arguments)
    except Exception as problem:
        # Whatever a tracker raises (no login, no network, a folder it cannot write) means the same here. One that never
        # began has nothing to finish.
        accelerator.trackers = [tracker for tracker in accelerator.trackers if getattr(tracker, "tracker", None) is not None]
        raise BadInput(f"a tracker did not start ({type(problem).__name__}: {str(problem).partition(chr(10))[0][:200]})", where="tracking.trackers",
                       fix="log in to it, use its offline mode (WANDB_MODE=offline), or leave it out") from problem


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they still hold."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _identity(accelerator: Accelerator, run: RunFolder) -> str:
    """A name of this run that no other has, kept so that it is found again when the run goes on."""
    kept = run.path / "tracking.json"
    if accelerator.is_main_process and not kept.exists():
        run.write_json(kept, {"id": hashlib.sha256(f"{run.path.resolve()}|{time.time_ns()}".encode()).hexdigest()[:16]})
    accelerator.wait_for_everyone()
    return json.loads(kept.read_text(encoding="utf-8"))["id"]
