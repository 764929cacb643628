"""Choose settings that fit a given memory, the fastest of those that give the same result first, and say what each one costs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.recipe import Recipe
from finetune.training.byte_sizes import size_text
from finetune.training.plan import Plan, Saving, estimate, fewest_checkpoints, resolved_hold
from finetune.training.plan_ground import Ground
from finetune.training.plan_model import BYTES
from finetune.training.placement import Hold, suits

# What each way to hold the weights costs beside time.
COSTS = {
    "bf16": "weights are cast when used; the same result where the file is bf16",
    "int8": "weights are rounded to 8 bits, so the adapter is trained on a slightly different base",
    "nf4": "weights are rounded to 4 bits, so the adapter is trained on a slightly different base",
    "streamed": "every weight is read from the file when it is used, on a GPU over the bus",
}
# Tried group by group; within a group the fastest that fits is taken. What changes no result comes first, but on a GPU the bus is
# slower than rounded weights.
SMALLER_HOLDS = {"cpu": (("bf16", "streamed"), ("int8",), ("nf4",)), "cuda": (("bf16",), ("int8",), ("nf4",), ("streamed",))}
# How much faster streaming must be than weights in memory: no plan knows whether the system still has the file when it is read again.
STREAMING_ODDS = 1.1
# What can be done on another machine.
ENCODING = ("encoding captions", "encoding pictures")
# What `fitted` may change.
CHANGEABLE = ("base.hold", "base.dtype", "training.checkpointed_blocks", "training.batch_size", "training.accumulation", "training.optimizer")
# What to do where a phase needs too much.
WAYS_OUT = {
    "training": "take smaller pictures (data.resolution), a lower adapter.rank, or a smaller base",
    "encoding captions": "fill the cache of encodings on a machine with more memory, and bring the folder here (BRUSHWORK_CACHE)",
    "encoding pictures": "take smaller pictures (data.resolution)",
    "drawing samples": "take smaller pictures (data.resolution)",
    "proof": "put the adapter on fewer layers (adapter.targets), or take a smaller base",
}

WAY_OUT_OF_HOST = "hold the base in nf4 or int8 (base.hold), or take a machine with more memory"


@dataclass(frozen=True)
class Choice:
    """Settings to try; recipe: with their batch size, accumulation, optimizer and format."""

    recipe: Recipe
    hold: Hold


def _changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _batches(recipe: Recipe, fixed: Collection[str]) -> Iterator[Recipe]:
    """As it is, and half the pictures at a time, twice as often: the same step."""
    yield recipe
    while recipe.training.batch_size > 1 and not {"training.batch_size", "training.accumulation"} & set(fixed):
        batch = (recipe.training.batch_size + 1) // 2
        recipe = _changed(recipe, "training", batch_size=batch, accumulation=recipe.training.accumulation * 2)
        yield recipe


def _groups(start: Choice, device: torch.device, fixed: Collection[str], divided: bool) -> Iterator[list[Choice]]:
    """From dear to cheap in memory; the last group also has moments in 8 bits. divided: between processes, which then hold the
    weights as they are."""
    kind = start.recipe.adapter.kind
    smaller = [[name for name in names if BYTES.get(name, 0) < BYTES.get(start.hold.name, 0) and suits(kind, name, device)] for names in SMALLER_HOLDS[device.type]]
    if "base.hold" in fixed or divided:
        smaller = []
    first = [start.hold.name, *(smaller[0] if smaller else [])]
    found = [[Choice(recipe, replace(start.hold, name=name)) for name in names for recipe in _batches(start.recipe, fixed)] for names in [first, *smaller[1:]] if names]
    yield from found
    if "training.optimizer" not in fixed and start.recipe.training.optimizer in ("auto", "adamw"):
        yield [replace(choice, recipe=_changed(choice.recipe, "training", optimizer="adamw8bit")) for group in found for choice in group]


def _with_smaller_encoders(recipe: Recipe, plan: Plan, fixed: Collection[str]) -> Recipe:
    """In 16 bits, where the text encoders would not fit by themselves."""
    if plan.phases_bytes.get("encoding captions", 0) <= plan.budget_bytes or recipe.base.dtype not in ("auto", "fp32") or "base.dtype" in fixed:
        return recipe
    return _changed(recipe, "base", dtype="bf16")


def too_large(made: Plan) -> dict[str, int]:
    """Phase -> bytes, of those that do not fit, the largest first."""
    return dict(sorted(((phase, size) for phase, size in made.phases_bytes.items() if size > made.budget_bytes), key=lambda pair: -pair[1]))


def fitted(ground: Ground, recipe: Recipe, budget: int, fixed: Collection[str] = ()) -> Plan:
    """The recipe's own settings where they fit. Else more checkpointed blocks, smaller batches and smaller weights, of which the
    fastest that fits is taken, those that change no result first; then moments in 8 bits.

    fixed: settings, as "section.key", that must stay. When nothing fits, the smallest plan, whose `fits` is False; where nothing can
    help because this memory does not encode the captions or pictures, the plan that fits once they are encoded elsewhere.
    """
    blocks = recipe.training.checkpointed_blocks
    least = 0 if blocks == "auto" else blocks
    keep_blocks = "training.checkpointed_blocks" in fixed and blocks != "auto"
    as_it_is = Choice(recipe, resolved_hold(recipe, ground.device))
    first = estimate(ground, recipe, as_it_is.hold, least, budget)
    if first.fits:
        return first
    smaller = _with_smaller_encoders(recipe, first, fixed)
    start = Choice(smaller, resolved_hold(smaller, ground.device))
    encoded = not too_large(estimate(ground, smaller, start.hold, least, budget)).keys().isdisjoint(ENCODING)

    def tried(choice: Choice) -> tuple[Plan, Choice]:
        return fewest_checkpoints(ground, choice.recipe, choice.hold, budget, encoded, None if keep_blocks else least), choice

    best = (estimate(ground, recipe, as_it_is.hold, least, budget, encoded), as_it_is)
    for group in _groups(start, ground.device, fixed, ground.sharding is not None):
        plans = [tried(choice) for choice in group]
        if fitting := [plan for plan in plans if plan[0].fits]:
            best = min(fitting, key=lambda plan: plan[0].seconds_per_step * (STREAMING_ODDS if plan[1].hold.name == "streamed" else 1))
            break
        best = min([best, *plans], key=lambda plan: plan[0].memory_bytes["peak"])
    made = estimate(ground, best[1].recipe, best[1].hold, best[0].settings["checkpointed_blocks"], budget)
    return replace(made, savings=list(_savings(ground, as_it_is, least, made, best[1], encoded)))


def _more_time(extra: float) -> str:
    """By this machine's probe."""
    return f"about {extra:.0%} more time a step" if extra >= 0.01 else "hardly any more time"


def _peak(made: Plan, aside: Collection[str]) -> int:
    return max(size for phase, size in made.phases_bytes.items() if phase not in aside)


def _savings(ground: Ground, before: Choice, least: int, made: Plan, choice: Choice, encoded: bool) -> Iterator[Saving]:
    """Each change beside the same plan without it: what it saves of the peak and takes in time. encoded: whether the peak
    is that of what follows the encoding, whose own peak the format alone changes."""
    recipe, old, blocks = choice.recipe, before.recipe, made.settings["checkpointed_blocks"]

    def saving(without: Recipe, hold: Hold, number: int, setting: str, value: Any, costs: str) -> Iterator[Saving]:
        other, aside = estimate(ground, without, hold, number, made.budget_bytes), ENCODING if encoded and setting != "base.dtype" else ()
        saved = _peak(other, aside) - _peak(made, aside)
        if saved > 0:
            yield Saving(setting, value, saved, f"{costs}; {_more_time(made.seconds_per_step / other.seconds_per_step - 1)}")

    if blocks > least:
        yield from saving(recipe, choice.hold, least, "training.checkpointed_blocks", blocks, f"{blocks} of {made.settings['blocks']} blocks are computed twice")
    if recipe.training.batch_size != old.training.batch_size:
        whole = _changed(recipe, "training", batch_size=old.training.batch_size, accumulation=old.training.accumulation)
        yield from saving(whole, choice.hold, blocks, "training.batch_size", recipe.training.batch_size, f"accumulation {recipe.training.accumulation}: the same step in smaller pieces")
    if recipe.base.dtype != old.base.dtype:
        yield from saving(_changed(recipe, "base", dtype=old.base.dtype), choice.hold, blocks, "base.dtype", recipe.base.dtype, "text encoders in 16 bits, so captions are encoded a little differently")
    if choice.hold.name != before.hold.name:
        yield from saving(recipe, before.hold, blocks, "base.hold", choice.hold.name, COSTS[choice.hold.name])
    if recipe.training.optimizer != old.training.optimizer:
        optimizer = _changed(recipe, "training", optimizer=old.training.optimizer)
        yield from saving(optimizer, choice.hold, blocks, "training.optimizer", recipe.training.optimizer, "moments in 8 bits; slower on a CPU")


def changes(made: Plan) -> list[str]:
    """What to give with --set to train with a fitted plan: "section.key=value"."""
    found = [f"{saving.setting}={saving.value}" for saving in made.savings]
    if any(saving.setting == "training.batch_size" for saving in made.savings):
        found.append(f"training.accumulation={made.settings['accumulation']}")
    return found


def host_need(made: Plan) -> str:
    """Of weights that wait for a GPU: how much they take of how much there is."""
    return f"{size_text(made.host_bytes)} of host memory, pinned for the weights, of {size_text(made.host_budget_bytes)}"


def refusal(made: Plan, fixed: Collection[str] = ()) -> tuple[str, str]:
    """Of a plan that does not fit: what is wrong, and what to do. fixed: as `fitted` was given it."""
    over, settled = too_large(made), [name for name in CHANGEABLE if name in fixed]
    needs = ", ".join([*(f"{size_text(size)} while {phase}" for phase, size in over.items()), *([host_need(made)] if not made.fits_host else [])])
    said = f"nothing fits {size_text(made.budget_bytes)}"
    if made.memory_bytes["libraries"] > made.budget_bytes:
        return f"{said}: the program's libraries alone take {size_text(made.memory_bytes['libraries'])} on this machine", f"no base is small enough: give more memory (this run: {size_text(made.memory_bytes['peak'])})"
    if made.fits_host and over.keys() <= set(ENCODING):
        there = "; all else fits here" + (" with " + " ".join(f"--set {change}" for change in changes(made)) if made.savings else "")
        there += ", base.dtype there too" if any(saving.setting == "base.dtype" for saving in made.savings) else ""
        return f"{said}: this run needs {needs}", "; ".join(WAYS_OUT[phase] for phase in over) + there
    ways = [*(WAYS_OUT[phase] for phase in over), *([] if made.fits_host else [WAY_OUT_OF_HOST]), *([f"leave {', '.join(settled)} to --fit"] if settled else [])]
    return f"{said}: with every saving{' that --set leaves' if settled else ''} this run needs {needs}", "; or ".join(dict.fromkeys(ways))
