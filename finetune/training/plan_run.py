"""The plan as part of a run: what "auto" becomes, the estimate on disk before the first step, the truth after the last."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import median

import torch

from data_tools.progress import Progress
from finetune.training.placement import Hold, suits
from finetune.training.plan import Plan, fewest_checkpoints
from finetune.training.plan_fit import host_need
from finetune.training.plan_ground import available_bytes, survey
from finetune.training.plan_record import write_plan, write_truth
from finetune.training.preparation import Prepared
from finetune.training.run_folder import RunFolder
from finetune.training.sharding import check_divisible
from finetune.training.token_training import without_tokens

# Of the memory that is free now, what a run counts on; the rest is other programs' growth.
COUNTED_ON = 0.95


def settle(prepared: Prepared, progress: Progress) -> Prepared:
    """The run with its final hold and number of checkpointed blocks; the plan is written to plan.json and said with reasons."""
    recipe, device = prepared.recipe, prepared.accelerator.device
    budget = _budget(prepared)
    ground = survey(recipe, prepared.training_set, sharding=prepared.sharding, kept_in=prepared.cache_folder, held_bytes=without_tokens(prepared.encodings).cache.held_bytes)
    made = fewest_checkpoints(ground, recipe, prepared.hold, budget)
    earlier = _earlier_hold(prepared.run) if recipe.base.hold == "auto" else None
    if earlier not in (None, prepared.hold.name):
        # A resumed run keeps what it began with: other weights would give another adapter.
        prepared = replace(prepared, hold=Hold(earlier, prepared.hold.compute, "as the run began"))
        made = fewest_checkpoints(ground, recipe, prepared.hold, budget)
    elif earlier is None and not made.fits and recipe.base.hold == "auto" and prepared.sharding is None:
        name = "streamed" if device.type == "cpu" else "nf4" if suits(recipe.adapter.kind, "nf4", device) else "int8"
        hold = Hold(name, prepared.hold.compute, f"the weights as {prepared.hold.name} would need {made.memory_bytes['peak'] >> 20} MiB of {budget >> 20} MiB")
        smaller = fewest_checkpoints(ground, recipe, hold, budget)
        if smaller.memory_bytes["peak"] < made.memory_bytes["peak"]:
            prepared, made = replace(prepared, hold=hold), smaller
            prepared.reasons["base weights"] = f"{hold.name}: {hold.reason}"
            progress.say(f"base weights {prepared.reasons['base weights']}")
    if prepared.sharding is not None:
        check_divisible(prepared.hold)
    blocks = made.settings["checkpointed_blocks"]
    if recipe.training.checkpointed_blocks == "auto":
        prepared.reasons["checkpointed blocks"] = f"{blocks} of {made.settings['blocks']}: the fewest that fit {budget >> 20} MiB"
        progress.say(f"checkpointed blocks {prepared.reasons['checkpointed blocks']}")
    _say(made, progress)
    if prepared.accelerator.is_main_process:
        write_plan(prepared.run.plan, made)
    return replace(prepared, checkpointed_blocks=blocks)


def _budget(prepared: Prepared) -> int:
    """Bytes that each process may count on; the same number in all, so that all choose the same."""
    accelerator = prepared.accelerator
    sharers = accelerator.num_processes if accelerator.device.type == "cpu" else 1
    mine = torch.tensor(-int(available_bytes(accelerator.device) * COUNTED_ON / sharers), device=accelerator.device)
    return -int(accelerator.reduce(mine, reduction="max"))


def _earlier_hold(run: RunFolder) -> str | None:
    """How the base was held when this run began; None for a new run."""
    try:
        return json.loads(run.plan.read_text(encoding="utf-8"))["estimate"]["settings"]["hold"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _say(made: Plan, progress: Progress) -> None:
    peak, budget = made.memory_bytes["peak"] >> 20, made.budget_bytes >> 20
    progress.say(f"plan: {peak} MiB at the peak, about {made.seconds_per_step:.2f} s a step")
    if not made.fits_host:
        progress.say(f"warning: the plan needs {host_need(made)}; base.hold = nf4 or int8 needs none")
    if not made.fits_device:
        progress.say(f"warning: the plan needs {peak} MiB and {budget} MiB are free; `brushwork plan --fit {max(budget >> 10, 1)}GB` shows settings that fit")


def record_truth(run: RunFolder, peak_memory_bytes: int) -> None:
    """Put the measured peak and the median step beside the estimate. The first steps warm up and are left out."""
    rows = [json.loads(line) for line in run.log.read_text(encoding="utf-8").splitlines()] if run.log.is_file() else []
    seconds = [row["seconds"] for row in rows[2:] or rows if "seconds" in row]
    write_truth(run.plan, peak_memory_bytes, round(median(seconds), 4) if seconds else None, run.path)
