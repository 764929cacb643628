"""Before the transformer is loaded: look at the pictures, compare with an interrupted run, write down what is about to happen, encode."""

from __future__ import annotations

import gc
import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_tools.atomic_files import write_text
from data_tools.progress import Progress
from finetune.errors import BadInput
from finetune.families.mapped_pages import trim_heap
from finetune.families.picture_limits import picture_limits
from finetune.families.preloading import late_imports
from finetune.objectives import LossWeighting, refuse_noise_offset
from finetune.recipe import Recipe, dump_recipe
from finetune.training.encode import Encodings, encode_everything
from finetune.training.encoding_cache import EncodingCache, require_writable
from finetune.training.optimizers import choose_optimizer
from finetune.training.placement import Hold, check_suits, choose_hold, load_held
from finetune.training.precision import PrecisionChoice, choose_base_dtype, choose_precision
from finetune.training.regularisation import draw_regularisation
from finetune.training.resume import check_continuation
from finetune.training.quantiser_library import require_kernels
from finetune.training.run_folder import RunFolder
from finetune.training.samples import SamplePlan, plan_samples
from finetune.training.sharding import Sharding, check_launch, wanted_sharding, without_engine
from finetune.training.text_training import check_trainable
from finetune.training.thoughts import shown_thoughts
from finetune.training.token_training import with_tokens
from finetune.training.tracking import accelerator_arguments
from finetune.training.data_sources import FolderScans
from finetune.training.training_set import TrainingSet, build_training_set

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.families.base_models import BaseModel


@dataclass(frozen=True)
class Prepared:
    """A run that is checked and encoded, before the transformer is loaded."""

    recipe: Recipe
    run: RunFolder
    base: BaseModel
    accelerator: Accelerator
    base_dtype: PrecisionChoice
    training_set: TrainingSet
    encodings: Encodings
    samples: SamplePlan
    reasons: dict[str, str]
    hold: Hold
    cache_folder: Path
    checkpointed_blocks: int = 0
    sharding: Sharding | None = None

    def load_base(self, progress: Progress, draws: bool = True) -> Any:
        """A fresh pipeline with the transformer and, where it `draws`, the VAE on the device, without an adapter. The weights
        of a base that will be divided over processes stay in host memory."""
        return load_held(self.base, self.hold, self.accelerator.device, self.cache_folder, progress, draws, stay=self.sharding is not None)


MOST_WARNINGS = 40  # shown while the run prepares
# A process may draw pictures or quantise the base for hours while the others wait; the launcher notices one that died.
LONGEST_WAIT = timedelta(hours=24)


def make_accelerator(recipe: Recipe, run: RunFolder) -> tuple[Accelerator, PrecisionChoice]:
    """Raises BadInput for a precision that the device lacks, for a way of starting that is not supported, and for a
    measurement that such a start cannot give."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    check_launch()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(recipe.training.precision, device)
    mixed = "no" if precision.name == "fp32" else precision.name
    # The library keeps one state a process; an earlier run in this process may have had another precision.
    AcceleratorState._reset_state()
    with without_engine():
        accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)], **accelerator_arguments(recipe, run))
    if recipe.training.gradient_noise and recipe.training.accumulation * accelerator.num_processes < 2:
        raise BadInput("the gradient noise is measured between micro-batches, and a step has only one", where="training.gradient_noise", fix="set training.accumulation to 2 or more")
    return accelerator, precision


def prepare(recipe: Recipe, run: RunFolder, accelerator: Accelerator, precision: PrecisionChoice, resume: bool, accepted: Collection[str],
             cache_folder: Path, progress: Progress, scans: FolderScans | None = None) -> Prepared:
    """Scan what is not in `scans`, compare with an interrupted run, write down what is about to happen, encode."""
    from finetune.families.base_models import locate_base

    require_writable(cache_folder)
    base = locate_base(recipe.base.model, recipe.base.revision)
    if recipe.adapter.text_encoders:
        check_trainable(base.family)
    if recipe.objective.noise_offset:
        refuse_noise_offset(base.family.objective(base.family.load(base.folder, frozenset(), torch.float32), None, LossWeighting()))
    if recipe.objective.guidance != 1:
        require_told_guidance(base)
    base_dtype = choose_base_dtype(recipe.base.dtype, precision)
    hold = choose_hold(recipe.base.hold, base_dtype, precision)
    check_suits(recipe.adapter.kind, hold, accelerator.device)
    sharding = wanted_sharding(accelerator, recipe, base.family.facts, hold)
    cache = EncodingCache(cache_folder)
    drawn = None
    if recipe.data.regularisation_prompt is not None:
        if sharding is not None:
            raise BadInput("a base that is divided over processes draws no regularisation pictures", where="data.regularisation_prompt",
                           fix="let one process draw them in a run of its own, and name its folder `regularisation` as data.regularisation_folder")
        if accelerator.is_main_process:
            if run.exists and resume:
                check_continuation(run, recipe, None, accepted)
            else:
                write_text(run.recipe, dump_recipe(recipe))  # drawing may take an hour, and is gone on with by the run's folder too
        drawn = run.regularisation
        with accelerator.main_process_first():
            draw_regularisation(recipe, base, drawn, hold, base_dtype.dtype, cache, accelerator.device, progress)
    with late_imports(base.folder):
        training_set = build_training_set(recipe, base.family.facts, progress, drawn, picture_limits(base), scans)
    _say_what_was_found(training_set, recipe, progress)
    optimizer = choose_optimizer(recipe.training.optimizer, accelerator.device)
    require_kernels(accelerator.device, optimizer.name, hold.name)
    reasons = {"precision": f"{precision.name}: {precision.reason}", "base weights": f"{hold.name}: {hold.reason}",
               "optimizer": f"{optimizer.name}: {optimizer.reason}"}
    for name, reason in reasons.items():
        progress.say(f"{name} {reason}")
    if accelerator.is_main_process:
        if run.exists and resume:
            check_continuation(run, recipe, training_set.data_hash, accepted)
        run.write_json(run.data_summary, _data_summary(training_set, recipe))
        write_text(run.recipe, dump_recipe(recipe))
    samples = plan_samples(recipe, base.family.facts, training_set)
    encodings = encode_everything(base, training_set.with_held_out(), samples.every_prompt(), recipe.data, cache, accelerator.device,
                                  base_dtype.dtype, recipe.training.workers, progress)
    if cache.mended:
        progress.say(f"{cache.mended} damaged encodings were made again")
    encodings = with_tokens(encodings, recipe, base, training_set, accelerator.device)
    gc.collect()
    trim_heap()  # what the encoders took
    return Prepared(recipe, run, base, accelerator, base_dtype, training_set, encodings, samples, reasons, hold, cache_folder, sharding=sharding)


def require_told_guidance(base: BaseModel) -> None:
    """Raise BadInput for a base that is told no guidance: `objective.guidance` would change nothing."""
    config = json.loads((base.folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    if not (base.family.facts.told_guidance and config.get("guidance_embeds")):
        raise BadInput("this base is not guidance-distilled, so that it is told no guidance", where="objective.guidance",
                       fix="leave it out; the guidance of the samples is samples.guidance")


def _data_summary(training_set: TrainingSet, recipe: Recipe) -> dict[str, Any]:
    """data.json: what is trained, for the report and for comparing when the run goes on."""
    return {
        "data_hash": training_set.data_hash, "pictures": len(training_set.own()), "layout": training_set.layout, "folders": list(training_set.folders),
        "sizes": [{"size": size, "own": own, "regularisation": others} for size, (own, others) in training_set.sizes().items()],
        "masks": training_set.masked(),
        "regularisation": list(dict.fromkeys(str(picture.record.path) for picture in training_set.pictures if picture.regularisation)),
        "held_out": [str(path) for path in training_set.held_out_paths()],
        "left_out": [{"path": str(left.path), "reason": left.reason} for left in training_set.left_out],
        "warnings": list(training_set.warnings),
        "thoughts": [] if recipe.data.thinking == "plain" else shown_thoughts(picture.record for picture in training_set.own()),
    }


def _say_what_was_found(training_set: TrainingSet, recipe: Recipe, progress: Progress) -> None:
    """For whoever waits: pictures, folders, masks, what is held out or left out, and settings that change nothing."""
    own, sizes = len(training_set.own()), training_set.sizes()
    progress.say(f"{own} pictures ({training_set.layout}), in buckets " + ", ".join(f"{size}: {sum(counts)}" for size, counts in sizes.items()))
    if len(training_set.folders) > 1:
        for row in training_set.folders:
            kind = "regularisation, no trigger" if row["regularisation"] else f"seen {row['seen']} times in an epoch"
            progress.say(f"from {row['folder']}: {row['pictures']} pictures, {kind}, loss x {row['weight']:g}")
    if recipe.data.masked_loss:
        masked = training_set.masked()
        progress.say(f"{masked} of {own} pictures have a mask; {'the others count everywhere' if masked else 'masked_loss changes nothing'}")
    elif recipe.data.unmasked_weight:
        progress.say("unmasked_weight changes nothing: masked_loss is not set")
    if recipe.data.regularisation_weight != 1 and not any(picture.regularisation for picture in training_set.pictures):
        progress.say("regularisation_weight changes nothing: there are no regularisation pictures")
    if training_set.held_out:
        held_out = training_set.held_out_paths()
        progress.say(f"{len(held_out)} pictures are held out and not trained: {', '.join(path.name for path in held_out)}")
    for warning in training_set.warnings[:MOST_WARNINGS]:
        progress.say(f"warning: {warning}")
    if len(training_set.warnings) > MOST_WARNINGS:
        progress.say(f"... and {len(training_set.warnings) - MOST_WARNINGS} more warnings; the report lists them all")
    for left in training_set.left_out:
        progress.say(f"left out: {left.path}: {left.reason}")
