"""What can be refused before a run, or its plan, imports anything heavy: its base, its folder, its pictures and their captions.

Whoever calls `train` or `plan` directly meets the same errors, later.
"""

from __future__ import annotations

from collections.abc import Collection

from data_tools.progress import Progress
from finetune.errors import RunFolderError
from finetune.families.base_models import refuse_unusable
from finetune.recipe import Recipe
from finetune.training.data_sources import FolderScans, require_run_outside
from finetune.training.encoding_cache import default_cache_folder, require_writable
from finetune.training.resume import check_continuation, check_steps
from finetune.training.run_folder import RunFolder
from finetune.training.tracking import check_trackers
from finetune.training.training_set import find_and_caption


def check_run(recipe: Recipe, run: RunFolder, resume: bool, accepted: Collection[str], progress: Progress) -> FolderScans:
    """What `train` raises of RunFolderError, BadInput, BaseModelError and DataError without a model. Returns what was seen of the pictures."""
    if not resume:
        require_run_outside(run.path, recipe)
    check_trackers(recipe)
    check_folder(run, recipe, resume, accepted)
    require_writable(default_cache_folder())
    refuse_unusable(recipe.base.model)
    return check_pictures(recipe, progress)


def check_folder(run: RunFolder, recipe: Recipe, resume: bool, accepted: Collection[str]) -> None:
    """Raises RunFolderError for a folder with a run that is not to be resumed, or cannot be with this recipe."""
    if not run.exists:
        return
    if not resume:
        raise RunFolderError("holds a run already", where=str(run.path), fix="go on with --resume, or choose another folder with --out")
    check_continuation(run, recipe, None, accepted)
    check_steps(run, recipe.training.steps, "training.steps")


def check_pictures(recipe: Recipe, progress: Progress) -> FolderScans:
    """Raises DataError for pictures that cannot be trained as the recipe wants. A recipe without a folder has none."""
    scans = FolderScans()
    if recipe.data.folder is not None:
        find_and_caption(recipe, progress, scans)
    return scans


def check_plan(recipe: Recipe, progress: Progress) -> FolderScans:
    """As `check_run`, for what `plan` raises."""
    refuse_unusable(recipe.base.model, parts=())
    return check_pictures(recipe, progress)
