"""The training loop. It knows no model family: what is special about one is behind `ModelFamily` and `Objective`.

Read it from the bottom up: `training_loop` is the whole story, `sample_losses` the mathematics of one micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from data_tools.progress import Progress
from finetune.errors import Interrupted, TrainingError
from finetune.families.protocol import Conditioning, ModelFamily, PictureGeometry
from finetune.objectives import NoiseLevel, Objective
from finetune.offload import bring
from finetune.randomness import generator, stable_seed
from finetune.recipe import Recipe
from finetune.training.batches import BatchOrder, Sample
from finetune.training.best_step import Measured
from finetune.training.encode import Encodings
from finetune.training.loop_state import LoopState
from finetune.training.loss_watch import LossWatch
from finetune.training.lr_schedules import learning_rate_factor
from finetune.training.masks import place_weights
from finetune.training.memory import peak_memory_bytes
from finetune.training.run_folder import RunFolder
from finetune.training.step import StepNumbers, optimizer_step
from finetune.training.stop_signals import StopRequest
from finetune.training.training_set import TrainingPicture, TrainingSet

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainingJob:
    """Everything the loop works with, loaded and ready.

    learning_rate: the highest one, 0 before it is known.  look(job, step) draws and measures what is due after `step` finished steps;
    save(step) writes a checkpoint of them.
    """

    recipe: Recipe
    accelerator: Accelerator
    family: ModelFamily
    objective: Objective
    transformer: torch.nn.Module
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    training_set: TrainingSet
    encodings: Encodings
    order: BatchOrder
    run: RunFolder
    look: Callable[[TrainingJob, int], Measured]
    save: Callable[[int], None]
    learning_rate: float = 0.0


@dataclass(frozen=True)
class MicroBatch:
    """Pictures of one bucket as the model gets them, all on its device. noisy, target: (B, C, h, w) float32.  level: of each.
    weights: (B,) factors on the samples' losses.  place_weights: (B, 1, h, w) factors on the squared error at each place, 1 on
    average for each sample; None where all places count alike."""

    noisy: torch.Tensor
    target: torch.Tensor
    level: NoiseLevel
    weights: torch.Tensor
    place_weights: torch.Tensor | None
    conditionings: list[Conditioning]
    geometries: list[PictureGeometry]
    dropout_seed: int

    def __len__(self) -> int:
        return len(self.conditionings)


def noise_positions(job: TrainingJob, step: int, total: int) -> torch.Tensor:
    """(total,) numbers in [0, 1), one for each sample of the step: stratified ones cover the interval evenly."""
    seed = job.recipe.training.seed
    inside = torch.rand(total, generator=generator(seed, "noise level", step))
    if not job.recipe.objective.stratified:
        return inside
    strata = torch.randperm(total, generator=generator(seed, "noise level order", step))
    return (strata + inside) / total


def sample_noise(job: TrainingJob, step: int, index: int, shape: torch.Size) -> torch.Tensor:
    """(C, h, w) noise of one sample. With `objective.noise_offset` a constant of its own is added to each channel, so that
    the mean of a picture is noised as strongly as its details (N. Guttenberg, "Diffusion with Offset Noise", crosslabs.org)."""
    seed, strength = job.recipe.training.seed, job.recipe.objective.noise_offset
    noise = torch.randn(shape, generator=generator(seed, "noise", step, index))
    if not strength:
        return noise
    return noise + strength * torch.randn(shape[0], 1, 1, generator=generator(seed, "noise offset", step, index))


def _place_weights(job: TrainingJob, samples: Sequence[Sample], grid: torch.Size) -> torch.Tensor | None:
    masks = [job.encodings.mask(sample.picture) for sample in samples]
    if all(mask is None for mask in masks):
        return None
    everywhere = torch.ones(grid)
    return torch.stack([place_weights(everywhere if mask is None else mask, job.recipe.data.unmasked_weight) for mask in masks])


def _conditioning(job: TrainingJob, step: int, sample: Sample) -> Conditioning:
    # Text encoders that are trained draw their dropout here.
    torch.manual_seed(stable_seed(job.recipe.training.seed, "text dropout", step, sample.index))
    return job.encodings.conditioning(job.training_set.captions.at(sample.picture, step, sample.index))


def micro_batch(job: TrainingJob, step: int, samples: Sequence[Sample], positions: torch.Tensor) -> MicroBatch:
    """Put a micro-batch together. Every draw is named by (seed, purpose, step, index of the sample in the step)."""
    seed = job.recipe.training.seed
    latents, noises = [], []
    for sample in samples:
        encoded = job.encodings.latents(sample.picture)
        spread = torch.randn(encoded.mean.shape, generator=generator(seed, "latent", step, sample.index))
        latents.append(encoded.mean + encoded.std * spread)
        noises.append(sample_noise(job, step, sample.index, encoded.mean.shape))
    device, objective = job.accelerator.device, job.objective
    pictures = [job.training_set.pictures[sample.picture] for sample in samples]
    places = _place_weights(job, samples, latents[0].shape[-2:])
    clean, noise = torch.stack(latents), torch.stack(noises)
    level = objective.level(positions[[sample.index for sample in samples]], clean)
    # What is not ready before the prediction would be waited for behind it.
    return MicroBatch(
        noisy=bring(objective.add_noise(clean, noise, level), device),
        target=bring(objective.target(clean, noise, level), device),
        level=replace(level, sigma=bring(level.sigma, device), timestep=bring(level.timestep, device)),
        weights=bring(objective.weight(level) * torch.tensor([picture.weight for picture in pictures]), device),
        place_weights=places if places is None else bring(places, device),
        conditionings=[_brought(_conditioning(job, step, sample), device) for sample in samples],
        geometries=[picture.geometry for picture in pictures],
        dropout_seed=stable_seed(seed, "dropout", step, samples[0].index),
    )


def _brought(conditioning: Conditioning, device: torch.device) -> Conditioning:
    return Conditioning({name: bring(tensor, device) for name, tensor in conditioning.tensors.items()})


def sample_losses(job: TrainingJob, batch: MicroBatch) -> torch.Tensor:
    """(B,) weighted mean squared errors, float32, with gradients to the adapter."""
    torch.manual_seed(batch.dropout_seed)
    prediction = job.family.predict(job.transformer, batch.noisy, batch.level, batch.conditionings, batch.geometries)
    errors = (prediction.float() - batch.target).pow(2)
    if batch.place_weights is not None:
        errors = errors * batch.place_weights
    return batch.weights * errors.flatten(1).mean(1)


def learning_rate_at(job: TrainingJob, step: int) -> float:
    settings = job.recipe.training
    return job.learning_rate * learning_rate_factor(settings.schedule, step, settings.steps, settings.warmup)


def take_step(job: TrainingJob, step: int, learning_rate: float) -> StepNumbers:
    """One optimizer step on the pictures of `step`."""
    settings = job.recipe.training
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_factor", 1.0)
    samples = job.order.micro_batches(step)
    positions = noise_positions(job, step, sum(map(len, samples)))
    return optimizer_step(
        job.accelerator, job.optimizer, job.parameters, samples,
        lambda some: sample_losses(job, micro_batch(job, step, some, positions)), settings.gradient_clip, settings.gradient_noise,
    )


def _pictures_of(job: TrainingJob, step: int) -> list[TrainingPicture]:
    return [job.training_set.pictures[sample.picture] for batch in job.order.micro_batches(step) for sample in batch]


def _names_of(job: TrainingJob, step: int) -> str:
    return ", ".join(dict.fromkeys(picture.record.path.name for picture in _pictures_of(job, step)))


def check_numbers(job: TrainingJob, step: int, numbers: StepNumbers, watch: LossWatch) -> None:
    """Raises TrainingError when a number is not finite (unless the recipe says skip) or the loss blows up."""
    fix = "lower training.learning_rate; the last checkpoint is whole, and --resume goes on from it"
    if numbers.bad:
        watch.skipped += 1
        if job.recipe.training.non_finite == "skip":
            return
        raise TrainingError(f"the {numbers.bad} of step {step + 1} is not finite; pictures: {_names_of(job, step)}", where=str(job.run.path), fix=fix)
    # Steps of pictures that count little have a small loss; without its weights it is like that of other steps.
    weights = [picture.weight for picture in _pictures_of(job, step)]
    mean_weight = sum(weights) / len(weights)
    if mean_weight and watch.blew_up(numbers.loss / mean_weight):
        raise TrainingError(
            f"the loss blew up at step {step + 1}: {numbers.loss:.3g} after {watch.lowest_single:.3g} at best; pictures: {_names_of(job, step)}",
            where=str(job.run.path), fix=fix,
        )


def _log_row(job: TrainingJob, done: int, numbers: StepNumbers, state: LoopState, seconds: float) -> dict[str, Any]:
    signal, noise = numbers.signal_and_noise or (None, None)
    measured = {"gradient_signal": signal, "gradient_noise": noise, "noise_scale": state.noise.samples}
    return {
        "step": done, "loss": numbers.loss, "lr": job.optimizer.param_groups[0]["lr"], "grad_norm": numbers.grad_norm,
        "applied": numbers.applied, "seconds": round(seconds, 4), "peak_memory_bytes": peak_memory_bytes(job.accelerator.device),
    } | {name: value for name, value in measured.items() if value is not None}


def _record(job: TrainingJob, row: dict[str, Any]) -> None:
    """Into log.jsonl, and to the trackers that the recipe names."""
    if job.accelerator.is_main_process:
        job.run.append_log(row)
    job.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def training_loop(job: TrainingJob, start: int, state: LoopState, stop: StopRequest, progress: Progress) -> int:
    """Take steps `start` .. `training.steps` - 1, looking, logging and saving on schedule. Returns the steps in all, which
    are fewer when what was looked at gave a reason to end early.

    Raises TrainingError (numbers blow up, disk full) and Interrupted (a signal; the finished step is saved first).
    """
    settings = job.recipe.training
    if state.ended:
        return start
    with progress.phase("training", settings.steps - start) as advance:
        for step in range(start, settings.steps):
            began = time.perf_counter()
            numbers = take_step(job, step, learning_rate_at(job, step))
            check_numbers(job, step, numbers, state.watch)
            state.took(numbers)
            done, is_last = step + 1, step + 1 == settings.steps
            row = _log_row(job, done, numbers, state, time.perf_counter() - began)
            advance(1, f"loss {state.watch.smoothed or numbers.loss:.4f}")

            # Looked at before it is saved: a checkpoint then knows all that was seen, and a resumed run misses nothing.
            measured = job.look(job, done)
            reason = state.judge(done, measured, is_last)
            _record(job, row | measured.logged())
            # Read once: a signal that comes while this step is saved, or after, stops the next one, which is then saved.
            asked = stop.agreed(job.accelerator)
            if is_last or reason or asked or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
                job.save(done)
            if reason:
                progress.say(f"training ends at step {done}: {reason}")
                return done
            if asked and not is_last:
                raise Interrupted(f"stopped at step {done} of {settings.steps}; everything is saved", where=str(job.run.path),
                                  fix="go on with the same command and --resume", exit_code=stop.exit_code)
    return settings.steps
