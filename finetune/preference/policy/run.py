"""`brushwork prefer train`: from a candidate folder to a proven adapter, guarded on the way, resumable anywhere."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache

from data_tools.atomic_files import write_text
from data_tools.errors import BadInput, DataError
from data_tools.progress import Progress
from finetune.errors import Interrupted, RunFolderError, TrainingError
from finetune.families.mapped_pages import trim_heap
from finetune.generation import usual_size
from finetune.objectives import LossWeighting, Objective
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.loaded_base import LoadedBase
from finetune.preference.pairs import preference_pairs
from finetune.preference.policy.contents import changed_contents, dump_started
from finetune.preference.policy.denoiser import Denoiser
from finetune.preference.policy.direct import DirectGradient
from finetune.preference.policy.dpo import DiffusionDPO
from finetune.preference.policy.drift import Check, DriftMeter
from finetune.preference.policy.finish import Finished, finish
from finetune.preference.policy.grpo import GRPO
from finetune.preference.policy.guard import Guard
from finetune.preference.policy.methods import Method
from finetune.preference.policy.paths import path_for
from finetune.preference.policy.pictures import encode_pairs
from finetune.preference.policy.settings import PreferenceSettings, read_settings, settings_file
from finetune.preference.policy.state import TrainedModel, restore_checkpoint, save_checkpoint
from finetune.preference.rewards.protocol import Reward
from finetune.preference.rewards.reward_files import load_reward, witness_of
from finetune.randomness import python_random
from finetune.training.lr_schedules import learning_rate_factor
from finetune.training.memory import peak_memory_bytes
from finetune.training.optimizers import build_optimizer, choose_optimizer
from finetune.training.quantiser_library import require_kernels
from finetune.training.resume import check_steps, find_checkpoint
from finetune.training.run_folder import RunFolder
from finetune.training.step import StepNumbers, optimizer_step
from finetune.training.sharding import check_launch, without_engine
from finetune.training.stop_signals import StopRequest, stop_on_signals

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.adapters.adapter_file import AdapterFile


@dataclass
class Job:
    """A run, loaded and ready."""

    settings: PreferenceSettings
    run: RunFolder
    loaded: LoadedBase
    accelerator: Accelerator
    denoiser: Denoiser
    model: TrainedModel
    method: Method
    meter: DriftMeter
    guard: Guard
    held_out: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    stopped: str | None = None


def train_preference(settings: PreferenceSettings, out: Path, *, resume: bool = False, progress: Progress | None = None) -> Finished:
    """Train, check, guard, export the best healthy adapter, load it back, prove it, draw before and after.

    Raises DataError, BadInput, BaseModelError, RunFolderError (bad input), TrainingError, VerifyError and Interrupted.
    """
    began, progress = time.monotonic(), progress or Progress()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput(f"preference learning runs in one process, not in {os.environ['WORLD_SIZE']}", where="accelerate launch",
                       fix="start it without `accelerate launch`; several cards can each do a run of their own")
    settings.check()
    run = RunFolder(out)
    _check_folder(run, settings, resume)
    run.claim()
    try:
        job = _prepare(settings, run, progress)
        with stop_on_signals() as stop:
            resumed_from = _learn(job, resume, stop, progress)
        facts = (job.guard, job.held_out, job.left_out, job.stopped, job.denoiser.shape, resumed_from)
        size = job.denoiser.geometry.target
        base, folder = job.loaded.base, CandidateFolder.existing(Path(settings.data))
        conditionings = job.loaded.conditionings
        # The trained model goes, and with it a reward that reads its hidden states: the fresh one needs the room.
        del job
        clear_device_cache(garbage_collection=True)
        trim_heap()
        return finish(settings, run, base, folder, conditionings, size, facts, began, progress)
    finally:
        run.release()


def _check_folder(run: RunFolder, settings: PreferenceSettings, resume: bool) -> None:
    if not run.exists and not settings_file(run).exists():
        return
    if not resume:
        raise RunFolderError("holds a run already", where=str(run.path), fix="go on with --resume, or choose another folder with --out")
    changes = settings.differences(read_settings(settings_file(run)))
    if changes:
        raise RunFolderError("the run was started with other settings: " + "; ".join(changes), where=str(run.path), fix="set them back, or start a new run with --out")
    if changed := changed_contents(settings, settings_file(run)):
        raise RunFolderError("the run was started with other contents of " + "; ".join(changed), where=str(run.path), fix="put the file back, or start a new run with --out")
    check_steps(run, settings.steps, "--steps")


def _prepare(settings: PreferenceSettings, run: RunFolder, progress: Progress) -> Job:
    """Read the folder, load the base, inject the LoRA, draw the base's held-out pictures."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    check_launch()
    folder = CandidateFolder.existing(Path(settings.data))
    train_prompts, held_out = split_prompts(folder, settings)
    loaded = LoadedBase.named(settings.base, settings.revision)
    loaded.worn = [(start, 1.0)] if (start := _start_of(settings)) is not None else ()
    loaded.encode([*train_prompts.values(), *held_out, ""])
    # The library keeps one state a process; an earlier run in this process may have had another precision.
    AcceleratorState._reset_state()
    with without_engine():
        accelerator = Accelerator(mixed_precision="no" if loaded.precision.name == "fp32" else loaded.precision.name, cpu=loaded.device.type == "cpu")
    reward = load_reward(settings.reward, loaded) if settings.reward else None
    _check_differentiable(settings, reward)
    witness = load_reward(settings.witness, loaded) if settings.witness else witness_of(settings.reward, loaded) if settings.reward else None
    objective = loaded.family.objective(loaded.pipeline, None, LossWeighting())
    pairs = encode_pairs(loaded, folder, [pair for pair in preference_pairs(folder.judgements(), ties=True) if pair.prompt_id in train_prompts], progress) if settings.method == "dpo" else ([], {}, [])
    if settings.method == "dpo" and not pairs[0]:
        raise DataError("there are no comparisons of training prompts to learn from", where=settings.data, fix="rate some pairs first: brushwork prefer rate")
    model = _inject(settings, loaded, accelerator)
    write_text(settings_file(run), dump_started(settings))
    denoiser = _denoiser(settings, folder, loaded, objective)
    progress.say(f"{len(train_prompts)} prompts to learn from, {len(held_out)} held out; drawing the base's pictures for the checks")
    meter = DriftMeter(denoiser, held_out[:settings.check_prompts], settings.check_seeds, settings.noise, reward, witness)
    method = _method(settings, denoiser, loaded, objective, reward, list(train_prompts.values()), pairs, meter)
    return Job(settings, run, loaded, accelerator, denoiser, model, method, meter, Guard(settings, meter.look_bands, meter.witness_spread), held_out, pairs[2])


def split_prompts(folder: CandidateFolder, settings: PreferenceSettings) -> tuple[dict[str, str], list[str]]:
    """(prompt id -> prompt to learn from, prompts held out), by seed. Raises DataError with fewer than 2 prompts."""
    prompts = {candidate.prompt_id: candidate.prompt for candidate in folder.candidates().values()}
    names = sorted(prompts)
    if len(names) < 2:
        raise DataError("one prompt cannot be split into learning and checking", where=settings.data, fix="make candidates for at least 2 prompts, better 20")
    python_random(settings.seed, "held-out prompts").shuffle(names)
    count = min(len(names) - 1, max(1, round(len(names) * settings.held_out)))
    return {name: prompts[name] for name in sorted(names[count:])}, [prompts[name] for name in sorted(names[:count])]


def _check_differentiable(settings: PreferenceSettings, reward: Reward | None) -> None:
    if settings.method in ("draft", "refl") and not reward.differentiable:
        raise DataError(f"{settings.method} needs a reward with gradients", where=str(settings.reward), fix="use --method grpo")


def _start_of(settings: PreferenceSettings) -> AdapterFile | None:
    """The adapter that the run starts from. Raises BadInput for one that cannot be a part of what is learned on top of it."""
    from finetune.adapters.adapter_file import read_adapter
    from finetune.adapters.forms import OFT
    from finetune.adapters.text_encoders import joined
    from finetune.families.key_layouts import KEY_MAPS

    if not settings.start:
        return None
    start = read_adapter(Path(settings.start), KEY_MAPS)
    if start.provenance.get("thinking_tokens"):
        raise BadInput("was trained with thinking tokens, which would stay behind", where=settings.start, fix="start from an adapter without them")
    if joined(start).uses_dora or start.form is OFT:
        raise BadInput("a DoRA or an OFT does not add up with what is learned on top of it", where=settings.start, fix="bake it into the base first")
    return start


def _inject(settings: PreferenceSettings, loaded: LoadedBase, accelerator: Accelerator) -> TrainedModel:
    """LoRA on the base; an adapter to start from is baked in first, so that it is part of the reference."""
    from finetune.adapters.attach import attach, bake
    from finetune.adapters.lora import inject_lora, lora_parameters
    from finetune.adapters.products import take_faster_products
    from finetune.families.targets import resolve_targets

    for start, weight in loaded.worn:
        attach(loaded.transformer, replace(start, text_encoders={}), "start", weight)
        bake(loaded.transformer)
    targets = resolve_targets(loaded.family.facts, settings.targets)
    inject_lora(loaded.transformer, targets, settings.rank, seed=settings.seed)
    loaded.family.prepare(loaded.transformer, 0)
    take_faster_products(loaded.transformer)
    # Dropout would make the same transition improbable the second time it is looked at.
    loaded.transformer.eval()
    named = lora_parameters(loaded.transformer)
    name = choose_optimizer(settings.optimizer, loaded.device).name
    require_kernels(loaded.device, name)
    optimizer = build_optimizer(name, [parameter for _, parameter in named], settings.learning_rate, 0.0)
    return TrainedModel(loaded.transformer, named, accelerator.prepare_optimizer(optimizer), accelerator.scaler)


def _denoiser(settings: PreferenceSettings, folder: CandidateFolder, loaded: LoadedBase, objective: Objective) -> Denoiser:
    """At the size of the candidates unless told otherwise."""
    first = next(iter(folder.candidates().values()))
    edge = usual_size(loaded.base)
    multiple = loaded.family.facts.size_multiple
    height, width = (max(multiple, (asked or known or edge) // multiple * multiple) for asked, known in ((settings.height, first.height), (settings.width, first.width)))
    path = path_for(objective, settings.sampler_steps, torch.Size((1, *loaded.latent_shape(height, width))))
    return Denoiser(loaded, objective, path, height=height, width=width, guidance=settings.guidance, seed=settings.seed, micro_batch=settings.micro_batch)


def _method(settings: PreferenceSettings, denoiser: Denoiser, loaded: LoadedBase, objective: Objective, reward: Reward | None, prompts: Sequence[str], pairs: Any, meter: DriftMeter) -> Method:
    if settings.method == "dpo":
        return DiffusionDPO(loaded, objective, pairs[0], pairs[1], beta=settings.beta, batch_size=settings.batch_size, micro_batch=settings.micro_batch, seed=settings.seed)
    if settings.method == "grpo":
        return GRPO(denoiser, reward, prompts, settings)
    return DirectGradient(denoiser, reward, prompts, settings, meter.reward_spread)


def _learn(job: Job, resume: bool, stop: StopRequest, progress: Progress) -> int | None:
    """The loop: step, log, check every so often, save with each check. Returns the step that was resumed from."""
    checkpoint = find_checkpoint(job.run, progress) if resume else None
    start = 0
    if checkpoint is not None:
        start = checkpoint.step
        job.stopped = restore_checkpoint(checkpoint, job.model, job.guard)
    else:
        job.guard.judge(job.meter.check(0))
    job.run.cut_log(start)
    with progress.phase(job.settings.method, job.settings.steps - start) as advance:
        for step in range(start, job.settings.steps):
            if job.stopped:
                break
            _take_step(job, step)
            done, is_last = step + 1, step + 1 == job.settings.steps
            if done % job.settings.check_every == 0 or is_last:
                _check(job, done, progress)
            # Read once: a signal that comes while this step is saved, or after, stops the next one, which is then saved.
            asked = stop.signal_number
            if done % job.settings.check_every == 0 or is_last or asked:
                save_checkpoint(job.run, job.settings, job.loaded.base, job.model, job.guard, done, job.stopped)
            advance(1, _note(job.guard.history[-1]))
            if asked and not is_last and not job.stopped:
                raise Interrupted(f"stopped at step {done} of {job.settings.steps}; everything is saved", where=str(job.run.path), fix="go on with the same command and --resume", exit_code=stop.exit_code)
    return checkpoint.step if checkpoint else None


def _note(check: Check) -> str:
    reward = "" if check.reward is None else f"reward {check.reward:.3f}, "
    return f"{reward}kl {check.kl:.2f}"


def _take_step(job: Job, step: int) -> None:
    began, settings = time.perf_counter(), job.settings
    rate = settings.learning_rate * learning_rate_factor("constant", step, settings.steps, settings.warmup)
    for group in job.model.optimizer.param_groups:
        group["lr"] = rate
    numbers: list[StepNumbers] = []
    for update in job.method.updates(step):
        numbers.append(optimizer_step(job.accelerator, job.model.optimizer, job.model.parameters, update.micro_batches, update.losses, settings.gradient_clip))
        if numbers[-1].bad:
            raise TrainingError(f"the {numbers[-1].bad} of step {step + 1} is not a finite number", where=str(job.run.path), fix="lower learning_rate, or raise kl_weight")
    job.run.append_log({
        "step": step + 1, "loss": sum(one.loss for one in numbers) / len(numbers), "grad_norm": max(one.grad_norm for one in numbers), "lr": rate,
        "seconds": round(time.perf_counter() - began, 4), "peak_memory_bytes": peak_memory_bytes(job.accelerator.device),
        **{f"train_{name}": value for name, value in job.method.numbers().items()},
    })


def _check(job: Job, done: int, progress: Progress) -> None:
    """Look at held-out prompts; keep the adapter when this is the best healthy check, stop when a meter is off."""
    check = job.meter.check(done)
    job.stopped = job.guard.judge(check)
    rows = job.run.read_log()
    rows[-1] |= {"reward": check.reward, "held_out_reward": check.witness, "kl": check.kl, "kl_steps": check.kl_steps, "diversity": check.diversity, "drift": check.drift, "out_of_range": check.out_of_range}
    job.run.cut_log(done - 1)
    job.run.append_log(rows[-1])
    if job.guard.best is check:
        job.model.keep_best(job.run, job.settings, job.loaded.base, done)
    if job.stopped:
        progress.say(f"stopped by the guard at step {done}: {job.stopped}")
