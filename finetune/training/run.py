"""The main job: a folder of pictures in, a proven adapter out."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_tools.progress import Progress
from data_tools.scan import LeftOut
from finetune.adapters.products import take_faster_products
from finetune.families.mapped_pages import trim_heap
from finetune.objectives import LossWeighting, TimestepSampling, with_guidance
from finetune.recipe import Recipe
from finetune.training.adapter_size import adapter_size
from finetune.training.allocator import keep_freed_memory
from finetune.training.batches import BatchOrder
from finetune.training.data_sources import FolderScans, require_run_outside
from finetune.training.early_checks import check_folder
from finetune.training.encoding_cache import default_cache_folder
from finetune.training.looks import Looks, SampleWatch
from finetune.training.loop import TrainingJob, training_loop
from finetune.training.loop_state import LoopState, copies_of_weights
from finetune.training.memory import peak_memory_bytes
from finetune.training.optimizers import build_optimizer, choose_optimizer
from finetune.training.plan_run import record_truth, settle
from finetune.training.preparation import Prepared, make_accelerator, prepare
from finetune.training.proof import Proof, prove_adapter, reference_prediction
from finetune.training.rate_finder import with_learning_rate
from finetune.training.report import write_report
from finetune.training.resume import check_not_over, find_checkpoint
from finetune.training.run_folder import RunFolder
from finetune.training.sharding import proof_hold, shard_base
from finetune.training.stop_signals import StopRequest, stop_on_signals
from finetune.training.text_training import LiveEncodings, add_trainable, inject_encoders
from finetune.training.token_training import named_parameters, parameter_groups
from finetune.training.tracking import check_trackers, finish_trackers, start_trackers
from finetune.training.training_set import TrainingSet
from finetune.training.training_state import check_disk, restore, save

if TYPE_CHECKING:
    from finetune.adapters.verify import VerifyResult


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run tells: `reasons` says why each automatic choice was made, `before` and `after` are the sample
    pictures of the base and of the adapter as it was loaded back. exported_step: whose weights the adapter has, of `steps`
    that were taken; `ended` says why they are fewer than asked for."""

    run: Path
    adapter: Path
    steps: int
    resumed_from: int | None
    seconds: float
    peak_memory_bytes: int
    verified: VerifyResult
    sheet: Path
    left_out: tuple[LeftOut, ...]
    reasons: dict[str, str]
    before: list[Path] = field(default_factory=list)
    after: list[Path] = field(default_factory=list)
    exported_step: int = 0
    ended: str | None = None
    held_out: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Trained:
    """reference: a prediction of the trained model, to compare the file with.  state: as the loop left it."""

    reference: torch.Tensor
    resumed_from: int | None
    steps: int
    state: LoopState


def train(recipe: Recipe, out: Path, *, resume: bool = False, progress: Progress | None = None, accept_changes: Collection[str] = (),
          cache_folder: Path | None = None, watch_samples: SampleWatch | None = None, scans: FolderScans | None = None) -> TrainingResult | None:
    """Check, encode, train, export, load back, prove and draw. The run's folder is `out`. Of several processes only the
    main one proves and returns a result; the others return None.

    watch_samples: called after each drawing of samples; its rows become `validation.jsonl`, and a row's "stop" ends the
    run early.  scans: what was seen of the pictures' folders already.
    Raises DataError, BaseModelError, RunFolderError (bad input), TrainingError, VerifyError (failures) and Interrupted.
    """
    began = time.monotonic()
    progress = progress or Progress()
    keep_freed_memory()
    run = RunFolder(out)
    if not resume:
        require_run_outside(run.path, recipe)
    check_trackers(recipe)
    accelerator, precision = make_accelerator(recipe, run)
    if accelerator.is_main_process:
        run.claim()
    try:
        if accelerator.is_main_process or resume:
            check_folder(run, recipe, resume, accept_changes)
        prepared = settle(prepare(recipe, run, accelerator, precision, resume, accept_changes, cache_folder or default_cache_folder(), progress, scans), progress)
        with stop_on_signals() as stop:
            trained = _train_adapter(prepared, resume, stop, progress, watch_samples)
        # The trained model is gone here: what follows must prove itself from the file alone. Its memory goes back to the
        # system, since the holes that it leaves are cut too exactly for a second model to fit in.
        gc.collect()
        trim_heap()
        accelerator.wait_for_everyone()
        return _finish(prepared, trained, began, progress) if accelerator.is_main_process else None
    finally:
        finish_trackers(accelerator)
        run.release()


def _load_transformer(prepared: Prepared, progress: Progress) -> Any:
    """The family's pipeline with the transformer on the device, the adapter injected. A pipeline that will draw is made with its
    autoencoder, from which it takes its sizes; `Looks` brings that back when it draws."""
    from finetune.adapters.kinds import inject_adapter
    from finetune.families.targets import resolve_targets

    recipe, family = prepared.recipe, prepared.base.family
    with prepared.accelerator.main_process_first():
        pipeline = prepared.load_base(progress, draws=recipe.samples.every > 0)
    if recipe.samples.every:
        pipeline.vae = None
    targets = resolve_targets(family.facts, recipe.adapter.targets)
    inject_adapter(pipeline.transformer, targets, adapter_size(recipe), seed=recipe.training.seed)
    family.prepare(pipeline.transformer, prepared.checkpointed_blocks)
    take_faster_products(pipeline.transformer)
    if prepared.sharding is not None:
        kept = shard_base(pipeline.transformer, prepared.sharding, prepared.accelerator.device)
        progress.say(f"the base is divided over {prepared.sharding.processes} processes by {prepared.sharding.by}: {kept:,} numbers in this one")
    return pipeline


def _with_live_text(prepared: Prepared, pipeline: Any) -> tuple[Prepared, list[tuple[str, torch.nn.Parameter]]]:
    """With LoRA on the text encoders, where the recipe wants it: encodings that pass through them, and their parameters."""
    recipe, family = prepared.recipe, prepared.base.family
    if not recipe.adapter.text_encoders:
        return prepared, []
    add_trainable(prepared.base, pipeline, prepared.base_dtype.dtype)
    named = inject_encoders(family, pipeline, adapter_size(recipe), recipe.training.seed)
    return replace(prepared, encodings=LiveEncodings(prepared.encodings, family, pipeline)), named


def _train_adapter(prepared: Prepared, resume: bool, stop: StopRequest, progress: Progress, watch_samples: SampleWatch | None) -> _Trained:
    """Train; afterwards the last checkpoint holds the adapter."""
    from finetune.adapters.kinds import start_parameters
    from finetune.adapters.lora import lora_parameters

    recipe, run, accelerator = prepared.recipe, prepared.run, prepared.accelerator
    pipeline = _load_transformer(prepared, progress)
    prepared, of_text = _with_live_text(prepared, pipeline)
    named = named_parameters([*lora_parameters(pipeline.transformer), *of_text], prepared.encodings)
    parameters = [parameter for _, parameter in named]
    optimizer_name = choose_optimizer(recipe.training.optimizer, accelerator.device).name
    optimizer = accelerator.prepare_optimizer(build_optimizer(optimizer_name, parameter_groups(named, recipe.training.lora_plus_ratio), 0.0, recipe.training.weight_decay))
    checkpoint = find_checkpoint(run, progress) if resume else None
    state, start = LoopState.at_start(recipe, parameters), 0
    if checkpoint is not None:
        start = restore(checkpoint, named, start_parameters(pipeline.transformer), optimizer, accelerator, state)
        check_not_over(run, state, start)
    if accelerator.is_main_process:
        run.cut_log(start)
        check_disk(run, parameters, recipe.training.keep_checkpoints, copies_of_weights(recipe, bool(prepared.training_set.held_out)))

    def keep(step: int) -> None:
        if accelerator.is_main_process:
            save(prepared, pipeline.transformer, named, optimizer, step, state)

    looks = Looks(prepared, pipeline, state, watch_samples, progress)
    objective = prepared.base.family.objective(pipeline, _timestep_sampling(recipe), LossWeighting(recipe.objective.weighting, recipe.objective.gamma))
    job = TrainingJob(
        recipe, accelerator, prepared.base.family, with_guidance(objective, recipe.objective.guidance),
        pipeline.transformer, parameters, optimizer, prepared.training_set, prepared.encodings, _batch_order(recipe, prepared.training_set, accelerator.num_processes), run,
        looks.after_step, keep,
    )
    if start == 0:
        looks.before_training(job)
    job = with_learning_rate(job, start, progress, prepared.reasons)
    start_trackers(accelerator, recipe, run, start)
    steps = training_loop(job, start, state, stop, progress)
    with state.exported():
        reference = reference_prediction(prepared.base.family, pipeline, prepared.encodings, prepared.training_set)
    return _Trained(reference, checkpoint.step if checkpoint else None, steps, state)


def _timestep_sampling(recipe: Recipe) -> TimestepSampling | None:
    settings = recipe.objective
    return None if settings.timesteps == "auto" else TimestepSampling(settings.timesteps, settings.shift, settings.mean, settings.std)


def _batch_order(recipe: Recipe, training_set: TrainingSet, processes: int) -> BatchOrder:
    """Two processes take the same steps as one with twice the accumulation."""
    buckets = [picture.placement.bucket for picture in training_set.pictures]
    repeats = [picture.repeats for picture in training_set.pictures]
    regularisation = [picture.regularisation for picture in training_set.pictures]
    return BatchOrder(buckets, repeats, recipe.training.batch_size, recipe.training.accumulation * processes, recipe.training.seed, regularisation)


def _finish(prepared: Prepared, trained: _Trained, began: float, progress: Progress) -> TrainingResult:
    """Export the last checkpoint's adapter, prove it on a fresh base, draw with it, write the report."""
    run, device, state = prepared.run, prepared.accelerator.device, trained.state
    if prepared.sharding is not None:
        prepared = replace(prepared, sharding=None, hold=proof_hold(prepared.hold))
    exported = state.exported_step(trained.steps)
    prepared.reasons.update(state.reasons(trained.steps))
    for line in state.reasons(trained.steps).values():
        progress.say(f"exported: {line}")
    proof: Proof = prove_adapter(prepared.base, lambda: prepared.load_base(progress), prepared.hold, run, trained.steps, trained.reference, prepared.encodings, prepared.training_set,
                                 prepared.samples, device, progress)
    seconds = time.monotonic() - began
    peak = max([peak_memory_bytes(device), *(row.get("peak_memory_bytes", 0) for row in run.read_log())])  # of the parts before a resumption, too
    result = TrainingResult(run.path, run.adapter, trained.steps, trained.resumed_from, round(seconds, 2), peak, proof.verified,
                            run.sheet, prepared.training_set.left_out, prepared.reasons, proof.before, proof.after, exported, state.ended,
                            tuple(prepared.training_set.held_out_paths()))
    run.write_json(run.result, {
        "steps": result.steps, "exported_step": exported, "ended": state.ended, "resumed_from": trained.resumed_from, "seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes,
        "verified": asdict(proof.verified), "reasons": prepared.reasons,
    })
    record_truth(run, result.peak_memory_bytes)
    write_report(run)
    return result
