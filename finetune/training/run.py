"""The main job: a folder of pictures in, a proven adapter out."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_tools.atomic_files import write_text
from data_tools.progress import Progress
from data_tools.scan import LeftOut
from finetune.errors import RunFolderError, TrainingError
from finetune.objectives import LossWeighting, TimestepSampling
from finetune.recipe import Recipe, dump_recipe
from finetune.training.batches import BatchOrder
from finetune.training.checkpoints import Checkpoint, keep_newest, write_checkpoint
from finetune.training.encode import Encodings, encode_everything
from finetune.training.encoding_cache import EncodingCache, default_cache_folder
from finetune.training.loop import TrainingJob, training_loop
from finetune.training.loss_watch import LossWatch
from finetune.training.memory import peak_memory_bytes
from finetune.training.optimizers import build_optimizer, choose_optimizer, optimizer_state, restore_optimizer
from finetune.training.precision import PrecisionChoice, choose_base_dtype, choose_precision
from finetune.training.preloading import preload
from finetune.training.proof import Proof, prove_adapter, reference_prediction
from finetune.training.resume import check_continuation, find_checkpoint
from finetune.training.run_folder import RunFolder
from finetune.training.samples import SamplePlan, draw_samples, plan_samples
from finetune.training.stop_signals import StopRequest, stop_on_signals
from finetune.training.training_set import TrainingSet, build_training_set

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.adapters.verify import VerifyResult
    from finetune.families.base_models import BaseModel


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run tells: `reasons` says why each automatic choice was made, `before` and `after` are the sample
    pictures of the base and of the adapter as it was loaded back."""

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


def train(recipe: Recipe, out: Path, *, resume: bool = False, progress: Progress | None = None, accept_changes: Collection[str] = (),
          cache_folder: Path | None = None) -> TrainingResult:
    """Check, encode, train, export, load back, prove and draw. The run's folder is `out`.

    Raises DataError, BaseModelError, RunFolderError (bad input), TrainingError, VerifyError (failures) and Interrupted.
    """
    began = time.monotonic()
    progress = progress or Progress()
    run = RunFolder(out)
    if run.exists and not resume:
        raise RunFolderError("holds a run already", where=str(out), fix="go on with --resume, or choose another folder with --out")
    preload()
    accelerator, choices = _accelerator(recipe)
    if accelerator.is_main_process:
        run.claim()
    with closing(_Released(run)):
        prepared = _prepare(recipe, run, accelerator, choices, resume, accept_changes, cache_folder or default_cache_folder(), progress)
        with stop_on_signals() as stop:
            reference, resumed_from = _train_adapter(prepared, resume, stop, progress)
        # The trained model is gone here: what follows must prove itself from the file alone.
        gc.collect()
        return _finish(prepared, reference, resumed_from, began, progress)


@dataclass(frozen=True)
class _Released:
    run: RunFolder

    def close(self) -> None:
        self.run.release()


def _accelerator(recipe: Recipe) -> tuple[Accelerator, PrecisionChoice]:
    from accelerate import Accelerator

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(recipe.training.precision, device)
    mixed = "no" if precision.name == "fp32" else precision.name
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu"), precision


def _prepare(recipe: Recipe, run: RunFolder, accelerator: Accelerator, precision: PrecisionChoice, resume: bool, accepted: Collection[str],
             cache_folder: Path, progress: Progress) -> Prepared:
    """Scan, compare with an interrupted run, write down what is about to happen, encode."""
    from finetune.families.base_models import locate_base

    base = locate_base(recipe.base.model, recipe.base.revision)
    training_set = build_training_set(recipe, base.family.facts, progress)
    _say_what_was_found(training_set, progress)
    base_dtype = choose_base_dtype(recipe.base.dtype, precision)
    optimizer = choose_optimizer(recipe.training.optimizer, accelerator.device)
    reasons = {"precision": f"{precision.name}: {precision.reason}", "base weights": f"{base_dtype.name}: {base_dtype.reason}",
               "optimizer": f"{optimizer.name}: {optimizer.reason}"}
    for name, reason in reasons.items():
        progress.say(f"{name} {reason}")
    if accelerator.is_main_process:
        if run.exists and resume:
            check_continuation(run, recipe, training_set.data_hash, accepted)
        run.write_json(run.data_summary, {
            "data_hash": training_set.data_hash, "pictures": len(training_set.pictures), "layout": training_set.layout,
            "left_out": [{"path": str(left.path), "reason": left.reason} for left in training_set.left_out],
        })
        write_text(run.recipe, dump_recipe(recipe))
    samples = plan_samples(recipe, base.family.facts, training_set)
    cache = EncodingCache(cache_folder)
    with accelerator.main_process_first():
        encodings = encode_everything(base, training_set, samples.every_prompt(), recipe.data.background, cache, accelerator.device,
                                      base_dtype.dtype, recipe.training.workers, progress)
    if cache.mended:
        progress.say(f"{cache.mended} damaged encodings were made again")
    gc.collect()
    return Prepared(recipe, run, base, accelerator, base_dtype, training_set, encodings, samples, reasons)


def _say_what_was_found(training_set: TrainingSet, progress: Progress) -> None:
    buckets: dict[str, int] = {}
    for picture in training_set.pictures:
        size = f"{picture.placement.bucket.width}x{picture.placement.bucket.height}"
        buckets[size] = buckets.get(size, 0) + 1
    progress.say(f"{len(training_set.pictures)} pictures ({training_set.layout}), in buckets " + ", ".join(f"{size}: {count}" for size, count in buckets.items()))
    for warning in training_set.warnings:
        progress.say(f"warning: {warning}")
    for left in training_set.left_out:
        progress.say(f"left out: {left.path}: {left.reason}")


def _load_transformer(prepared: Prepared) -> Any:
    """The family's pipeline with transformer and VAE (for sample pictures) on the device, LoRA injected."""
    from finetune.adapters.lora import inject_lora

    recipe, family = prepared.recipe, prepared.base.family
    pipeline = family.load(prepared.base.folder, frozenset({"transformer", "vae"}), prepared.base_dtype.dtype)
    pipeline.to(prepared.accelerator.device)
    targets = family.facts.targets.get(recipe.adapter.targets, recipe.adapter.targets)
    inject_lora(pipeline.transformer, targets, recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout, seed=recipe.training.seed)
    blocks = recipe.training.checkpointed_blocks
    family.prepare(pipeline.transformer, 0 if blocks == "auto" else blocks)
    return pipeline


def _train_adapter(prepared: Prepared, resume: bool, stop: StopRequest, progress: Progress) -> tuple[torch.Tensor, int | None]:
    """Train; afterwards the last checkpoint holds the adapter. Returns a prediction of the trained model to compare with."""
    from finetune.adapters.lora import lora_parameters

    recipe, run, accelerator = prepared.recipe, prepared.run, prepared.accelerator
    pipeline = _load_transformer(prepared)
    named = lora_parameters(pipeline.transformer)
    parameters = [parameter for _, parameter in named]
    optimizer_name = choose_optimizer(recipe.training.optimizer, accelerator.device).name
    optimizer = accelerator.prepare(build_optimizer(optimizer_name, parameters, recipe.training.learning_rate, recipe.training.weight_decay))
    checkpoint = find_checkpoint(run, recipe.training.steps, progress) if resume else None
    watch, start = LossWatch(), 0
    if checkpoint is not None:
        watch, start = _restore(checkpoint, named, optimizer, accelerator)
    if accelerator.is_main_process:
        run.cut_log(start)
        _check_disk(run, parameters, recipe.training.keep_checkpoints)

    def save(step: int, watch: LossWatch) -> None:
        if accelerator.is_main_process:
            _save(prepared, pipeline.transformer, named, optimizer, step, watch)

    def draw(step: int) -> None:
        if accelerator.is_main_process:
            draw_samples(prepared.samples, prepared.base.family, pipeline, prepared.encodings, run.samples, f"step-{step:06d}", progress)

    if start == 0:
        draw(0)
    sampling = _timestep_sampling(recipe)
    job = TrainingJob(
        recipe, accelerator, prepared.base.family, prepared.base.family.objective(pipeline, sampling, LossWeighting(recipe.objective.weighting, recipe.objective.gamma)),
        pipeline.transformer, parameters, optimizer, prepared.training_set, prepared.encodings, _batch_order(recipe, prepared.training_set), run, save, draw,
    )
    training_loop(job, start, watch, stop, progress)
    return reference_prediction(prepared.base.family, pipeline, prepared.encodings, prepared.training_set), checkpoint.step if checkpoint else None


def _timestep_sampling(recipe: Recipe) -> TimestepSampling | None:
    settings = recipe.objective
    return None if settings.timesteps == "auto" else TimestepSampling(settings.timesteps, settings.shift, settings.mean, settings.std)


def _batch_order(recipe: Recipe, training_set: TrainingSet) -> BatchOrder:
    buckets = [picture.placement.bucket for picture in training_set.pictures]
    repeats = [picture.record.repeats for picture in training_set.pictures]
    return BatchOrder(buckets, repeats, recipe.training.batch_size, recipe.training.accumulation, recipe.training.seed)


def _restore(checkpoint: Checkpoint, named: Sequence[tuple[str, torch.nn.Parameter]], optimizer: Any, accelerator: Accelerator) -> tuple[LossWatch, int]:
    with torch.no_grad():
        for name, parameter in named:
            saved = checkpoint.tensors.get(f"parameter/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise RunFolderError(f"the checkpoint has no fitting {name}", where=str(checkpoint.folder), fix="resume with the adapter settings that the run was started with")
            parameter.copy_(saved)
    restore_optimizer(optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
    if accelerator.scaler is not None and checkpoint.state.get("scaler"):
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    return LossWatch(**checkpoint.state["watch"]), checkpoint.step


def _check_disk(run: RunFolder, parameters: Sequence[torch.nn.Parameter], kept: int) -> None:
    """A run that cannot store its checkpoints stops before the first step, not at the last."""
    import shutil

    # A checkpoint holds the adapter, the parameters and two moments; one more is written before the oldest goes.
    needed = 4 * sum(parameter.numel() * 4 for parameter in parameters) * (kept + 1)
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise TrainingError(f"the disk has {free / 2**20:.0f} MiB left and the checkpoints need {needed / 2**20:.0f} MiB", where=str(run.path),
                            fix="free disk space, lower training.keep_checkpoints, or choose another folder with --out")


def _save(prepared: Prepared, transformer: torch.nn.Module, named: Sequence[tuple[str, torch.nn.Parameter]], optimizer: Any, step: int, watch: LossWatch) -> None:
    from finetune.adapters.adapter_file import write_adapter
    from finetune.adapters.lora import collect_lora

    tensors, structure = optimizer_state(optimizer)
    tensors |= {f"parameter/{name}": parameter.detach().cpu().clone() for name, parameter in named}
    scaler = prepared.accelerator.scaler
    state = {
        "optimizer": structure, "watch": asdict(watch), "scaler": scaler.state_dict() if scaler is not None else None,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "settings_hash": prepared.recipe.settings_hash(),
        "data_hash": prepared.training_set.data_hash,
    }
    adapter = collect_lora(transformer).with_provenance(**_provenance(prepared, step))
    try:
        write_checkpoint(prepared.run.checkpoints, step, tensors, state, lambda path: write_adapter(path, adapter))
    except OSError as problem:
        raise TrainingError(f"cannot write the checkpoint of step {step}: {problem.strerror or problem}", where=str(prepared.run.checkpoints),
                            fix="free disk space and go on with --resume from the last whole checkpoint") from problem
    keep_newest(prepared.run.checkpoints, prepared.recipe.training.keep_checkpoints)


def _provenance(prepared: Prepared, step: int) -> dict[str, Any]:
    return {
        "base_model": prepared.base.identifier, "base_revision": prepared.base.revision, "family": prepared.base.family.facts.name,
        "recipe_hash": prepared.recipe.settings_hash(), "data_hash": prepared.training_set.data_hash, "trigger": prepared.recipe.data.trigger,
        "licence": prepared.recipe.publish.licence or prepared.base.licence.identifier, "steps": step, "pictures": len(prepared.training_set.pictures),
    }


def _finish(prepared: Prepared, reference: torch.Tensor, resumed_from: int | None, began: float, progress: Progress) -> TrainingResult:
    """Export the last checkpoint's adapter, prove it on a fresh base, draw with it, write the report."""
    recipe, run, device = prepared.recipe, prepared.run, prepared.accelerator.device
    prepared.accelerator.wait_for_everyone()
    proof: Proof = prove_adapter(prepared.base, prepared.base_dtype.dtype, run, recipe.training.steps, reference, prepared.encodings, prepared.training_set,
                                 prepared.samples, device, progress)
    seconds = time.monotonic() - began
    result = TrainingResult(run.path, run.adapter, recipe.training.steps, resumed_from, round(seconds, 2), peak_memory_bytes(device), proof.verified,
                            run.sheet, prepared.training_set.left_out, prepared.reasons, proof.before, proof.after)
    if prepared.accelerator.is_main_process:
        run.write_json(run.result, {
            "steps": result.steps, "resumed_from": resumed_from, "seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes,
            "verified": asdict(proof.verified), "reasons": prepared.reasons,
        })
    return result
