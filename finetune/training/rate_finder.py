"""`learning_rate = "find"`: a range test on the job itself (Smith 2015, arXiv 1506.01186), from which everything is put back.

The rate rises from step to step by a constant factor, and the loss is looked at after each. With diffusion the loss of a
step says little, since it depends on the noise level that was drawn: here it is measured on the same pictures, levels and
noise every time, so that what moves it is the training alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from data_tools.progress import Progress
from finetune.errors import RunFolderError, TrainingError
from finetune.recipe import Recipe
from finetune.training.held_out_loss import fixed_loss
from finetune.training.loop import TrainingJob, take_step
from finetune.training.run_folder import RunFolder
from finetune.training.weight_copies import WeightCopy

LOWEST, HIGHEST = 1e-6, 1.0
STEPS = 72
# The test is over when the loss is this many times the lowest (as in fastai's range test).
DIVERGED = 4.0
# A centred mean over this many points: unlike a running average it does not move the curve to higher rates.
SMOOTHED_OVER = 5
# Samples on which the loss is measured: twice those of a step, within these bounds.
FEWEST_SAMPLES, MOST_SAMPLES = 8, 64


@dataclass(frozen=True)
class RangeTest:
    """Loss after each step of the ramp, smoothed too, and the learning rate taken from it."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    chosen: float


def smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over a window around each point; smaller at the ends, so that it stays centred."""
    half = SMOOTHED_OVER // 2
    result = []
    for place in range(len(losses)):
        reach = min(half, place, len(losses) - 1 - place)
        window = losses[place - reach:place + reach + 1]
        result.append(sum(window) / len(window))
    return result


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the loss falls fastest per factor of the rate, left of its lowest point; None where it never falls.

    The choice is fastai's "steep". Its "valley" wants a noisy curve: at fixed noise the loss falls from the first step on,
    and a third of the way along that fall lies at a rate far too small.
    """
    if len(losses) < 3:
        return None
    lowest = min(range(len(losses)), key=losses.__getitem__)
    slopes = {place: (losses[place + 1] - losses[place - 1]) / math.log(rates[place + 1] / rates[place - 1]) for place in range(1, lowest)}
    place = min(slopes, key=slopes.__getitem__, default=None)
    return None if place is None or slopes[place] >= 0 else rates[place]


def find_learning_rate(job: TrainingJob, progress: Progress) -> RangeTest:
    """Run the test from the job's state as it is; parameters, optimizer and scaler are put back exactly.

    Raises TrainingError when no rate makes the loss fall.
    """
    kept, scaler = WeightCopy(job.parameters), job.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else None
    try:
        rates, losses = _ramp(job, progress)
    finally:
        with torch.no_grad():
            for parameter, before in zip(job.parameters, kept.tensors, strict=True):
                parameter.copy_(before)
        job.optimizer.state.clear()
        job.optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.load_state_dict(scale)
    smooth = smoothed(losses)
    chosen = steepest(rates, smooth)
    if chosen is None:
        raise TrainingError(f"no learning rate from {LOWEST:g} to {HIGHEST:g} makes the loss fall", where="training.learning_rate", fix="set it to a number, for example 1e-4")
    # Two digits: more would claim a precision that the test does not have.
    return RangeTest(rates, losses, smooth, float(f"{chosen:.1e}"))


def _ramp(job: TrainingJob, progress: Progress) -> tuple[list[float], list[float]]:
    """(rates, loss after the step with each), up to where the loss diverges or is no number."""
    pictures, levels = _watched(job)
    rates, losses = [], []
    with progress.phase("searching for a learning rate", STEPS) as advance:
        for step in range(STEPS):
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
            numbers = take_step(job, step, rate)
            loss = fixed_loss(job, pictures, levels, "range test") if not numbers.bad else math.nan
            if not math.isfinite(loss) or losses and loss > DIVERGED * min(losses):
                break
            rates.append(rate)
            losses.append(loss)
            advance(1, f"{rate:.1e}: loss {loss:.4f}")
    return rates, losses


def samples_of_a_look(recipe: Recipe) -> int:
    """On how many samples the loss is measured after each step of the ramp."""
    return min(MOST_SAMPLES, max(FEWEST_SAMPLES, 2 * recipe.training.batch_size * recipe.training.accumulation))


def _watched(job: TrainingJob) -> tuple[list[int], int]:
    """Pictures to measure on, held-out ones where there are any, and how many noise levels each."""
    trained, held_out = len(job.training_set.pictures), len(job.training_set.held_out)
    candidates = range(trained, trained + held_out) if held_out else range(trained)
    wanted = samples_of_a_look(job.recipe)
    pictures = list(candidates)[::max(1, len(candidates) // wanted)][:wanted]
    return pictures, max(1, wanted // len(pictures))


def learning_rate_of(run: RunFolder, job: TrainingJob, start: int, progress: Progress) -> float:
    """The rate of this run: searched for and written down before the first step, read when the run goes on.

    Raises RunFolderError when a run that goes on has lost it."""
    if start == 0:
        found = find_learning_rate(job, progress)
        if job.accelerator.is_main_process:
            run.write_json(run.learning_rate, asdict(found))
        return found.chosen
    try:
        return float(json.loads(run.learning_rate.read_text(encoding="utf-8"))["chosen"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise RunFolderError(f"the learning rate that this run found cannot be read ({type(problem).__name__})", where=str(run.learning_rate),
                             fix="set it with --set training.learning_rate=NUMBER --accept-change training.learning_rate; log.jsonl has it under lr") from problem


def with_learning_rate(job: TrainingJob, start: int, progress: Progress, reasons: dict[str, Any]) -> TrainingJob:
    """The job with the learning rate of the recipe, or with the one that is found for it."""
    if job.recipe.training.learning_rate != "find":
        return replace(job, learning_rate=job.recipe.training.learning_rate)
    rate = learning_rate_of(job.run, job, start, progress)
    reasons["learning rate"] = f"{rate:g}: the loss fell fastest there in a range test of at most {STEPS} steps"
    progress.say(f"learning rate {reasons['learning rate']}")
    return replace(job, learning_rate=rate)
