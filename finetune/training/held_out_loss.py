"""The loss on given pictures at fixed noise levels and fixed noise, so that it can be compared between steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from finetune.randomness import generator, stable_seed
from finetune.training.batches import Sample
from finetune.training.loop import TrainingJob, micro_batch, sample_losses


def fixed_batches(buckets: Sequence[Hashable], pictures: Sequence[int], batch_size: int, levels: int) -> list[list[Sample]]:
    """Each of `pictures` `levels` times, in batches of one bucket. buckets: of every picture."""
    by_bucket: dict[Hashable, list[Sample]] = {}
    for place, picture in enumerate(pictures):
        by_bucket.setdefault(buckets[picture], []).extend(Sample(picture, place * levels + level) for level in range(levels))
    return [samples[start:start + batch_size] for samples in by_bucket.values() for start in range(0, len(samples), batch_size)]


def fixed_positions(pictures: int, levels: int, seed: int) -> torch.Tensor:
    """(pictures * levels,) numbers in [0, 1): each picture covers the interval evenly, and so do all together."""
    order = torch.randperm(pictures, generator=generator(seed, "fixed levels"))
    return ((torch.arange(levels)[None, :] + (order[:, None] + 0.5) / pictures) / levels).flatten()


def fixed_job(job: TrainingJob, purpose: str) -> TrainingJob:
    """The job as it looks at pictures without training: no caption is dropped, held-out pictures are numbered on after the
    trained ones, and a seed of its own names every draw."""
    seed = stable_seed(job.recipe.training.seed, purpose)
    training = job.recipe.training.model_copy(update={"seed": seed})
    return replace(job, recipe=job.recipe.model_copy(update={"training": training}), training_set=job.training_set.with_held_out(dropout=0.0))


def fixed_loss(job: TrainingJob, pictures: Sequence[int], levels: int, purpose: str) -> float:
    """Mean loss over `pictures` at `levels` noise levels each; noise, levels and captions are the same at every call for the
    same `purpose`. What the loss weighs is what training weighs, and a picture that training sees three times counts three
    times. Several processes share the work."""
    looking = fixed_job(job, purpose)
    buckets = [picture.placement.bucket for picture in looking.training_set.pictures]
    repeats = torch.tensor([picture.repeats for picture in looking.training_set.pictures])
    batches = fixed_batches(buckets, pictures, job.recipe.training.batch_size, levels)
    positions = fixed_positions(len(pictures), levels, looking.recipe.training.seed)
    accelerator = job.accelerator
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    was_training = job.transformer.training
    job.transformer.eval()
    with torch.no_grad(), accelerator.autocast():
        for first in range(0, len(batches), accelerator.num_processes):
            place = first + accelerator.process_index
            # A divided base computes only when all processes do: one without a batch of its own takes the last, and does not count it.
            samples = batches[min(place, len(batches) - 1)]
            losses = sample_losses(looking, micro_batch(looking, 0, samples, positions)).double()
            total += (losses * repeats[[sample.picture for sample in samples]].to(losses.device)).sum() * (place < len(batches))
    job.transformer.train(was_training)
    return (accelerator.reduce(total, reduction="sum") / (levels * repeats[list(pictures)].sum())).item()


def held_out_loss(job: TrainingJob) -> float:
    """Mean loss over all held-out pictures at `validation.levels` noise levels each, comparable between steps: what a step on
    them would have, were they trained."""
    trained = len(job.training_set.pictures)
    return fixed_loss(job, range(trained, trained + len(job.training_set.held_out)), job.recipe.validation.levels, "held-out loss")
