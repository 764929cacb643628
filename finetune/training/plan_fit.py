"""Choose settings that fit a given memory, the cheapest savings first, and say what each one costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.recipe import Recipe
from finetune.training.plan import Ground, Plan, Saving, estimate, fewest_checkpoints, resolved_hold, with_savings
from finetune.training.placement import Hold

# How the weights could be held, from dear to cheap in memory, and what that costs.
SMALLER_HOLDS = (
    ("bf16", "weights are cast when used; the same result where the file is bf16"),
    ("nf4", "weights are rounded to 4 bits, so the adapter is trained on a slightly different base"),
    ("streamed", "every weight is read from the file when it is used, on a GPU over the bus"),
)


def _changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _more_time(extra: float) -> str:
    """By this machine's probe."""
    return f"about {extra:.0%} more time a step" if extra >= 0.01 else "hardly any more time"


def _smaller_batches(recipe: Recipe) -> Iterator[Recipe]:
    """Half the pictures at a time, twice as often: the same step."""
    while recipe.training.batch_size > 1:
        batch = (recipe.training.batch_size + 1) // 2
        recipe = _changed(recipe, "training", batch_size=batch, accumulation=recipe.training.accumulation * 2)
        yield recipe


def fitted(ground: Ground, recipe: Recipe, budget: int) -> Plan:
    """The first of these that fits: as it is; more checkpointed blocks; smaller batches; smaller weights (not where they are
    divided between processes); 8-bit moments.

    When nothing fits, the smallest plan, whose `fits` is False.
    """
    hold, savings = resolved_hold(recipe, ground.device), []
    current = estimate(ground, recipe, hold, 0 if recipe.training.checkpointed_blocks == "auto" else recipe.training.checkpointed_blocks, budget)

    def took(made: Plan, setting: str, value: Any, costs: str) -> Plan:
        saved = current.memory_bytes["peak"] - made.memory_bytes["peak"]
        if saved > 0:
            savings.append(Saving(setting, value, saved, costs))
        return made if saved > 0 else current

    if not current.fits and recipe.training.checkpointed_blocks == "auto":
        made = fewest_checkpoints(ground, recipe, hold, budget)
        blocks = made.settings["checkpointed_blocks"]
        extra = made.seconds_per_step / current.seconds_per_step - 1
        current = took(made, "training.checkpointed_blocks", blocks, f"{blocks} of {made.settings['blocks']} blocks are computed twice: {_more_time(extra)}")
    for smaller in _smaller_batches(recipe):
        if current.fits:
            break
        made = fewest_checkpoints(ground, smaller, hold, budget)
        current = took(made, "training.batch_size", smaller.training.batch_size,
                       f"accumulation {smaller.training.accumulation}: the same step in smaller pieces, a little slower")
        recipe = smaller
    for name, costs in SMALLER_HOLDS if recipe.base.hold == "auto" and ground.sharding is None else ():
        if current.fits:
            break
        made = fewest_checkpoints(ground, recipe, Hold(name, hold.compute, costs), budget)
        extra = made.seconds_per_step / current.seconds_per_step - 1
        current = took(made, "base.hold", name, f"{costs}; {_more_time(extra)}")
    if not current.fits and recipe.training.optimizer == "auto":
        smaller = _changed(recipe, "training", optimizer="adamw8bit")
        held = Hold(current.settings["hold"], hold.compute, "")
        current = took(fewest_checkpoints(ground, smaller, held, budget), "training.optimizer", "adamw8bit", "moments in 8 bits; slower on a CPU")
    return with_savings(current, savings)
