"""`brushwork plan`: time and memory before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.output import Json, Quiet, emit, progress_for
from finetune.cli.run_arguments import Base, Changes, RecipeName, Target, Trigger, wanted_recipe

if TYPE_CHECKING:
    from finetune.training.plan import Plan

GIB = 2**30


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("plan")(plan)


def plan(
    target: Target,
    base: Base = None, recipe: RecipeName = None, trigger: Trigger = None, changes: Changes = None,
    fit: Annotated[str | None, typer.Option("--fit", metavar="SIZE", help="Choose settings that fit into this much memory, for example 12GB.")] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, max=4096, help="Divide the base between so many, as `accelerate launch --config_file recipes/accelerate/fsdp.yaml` does; memory is then that of each. (Without that file each has the whole base, as one has.)")] = 1,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Memory, time and disk of a run, before it starts."""
    wanted = wanted_recipe(target, base, recipe, trigger, changes, needs_pictures=False)
    progress = progress_for(quiet)
    for note in wanted.notes:
        progress.say(note)

    from finetune.training.plan import plan as make_plan

    made = make_plan(wanted.recipe, fit=fit, processes=processes, progress=progress)
    emit(made.as_json(), _lines(made), json=json)


def _lines(made: Plan) -> list[str]:
    width = max(map(len, made.memory_bytes))
    disk = {name: size for name, size in made.disk_bytes.items() if name != "total" and size}
    parts = [f"{name.replace('_', ' ')} {_size(size)}" for name, size in disk.items()]
    lines = [
        f"{made.parameters:,} parameters, {made.trainable:,} of them trained, on {made.device}",
        f"memory: {_size(made.memory_bytes['peak'])} of {_size(made.budget_bytes)}: {'fits' if made.fits else 'DOES NOT FIT'}",
        *(f"  {name:{width}}  {_size(size)}" for name, size in made.memory_bytes.items() if name != "peak"),
        f"a step: {made.seconds_per_step:.2f} s, {made.flops_per_step / 1e12:.2f} TFLOP",
        f"disk: {_size(sum(disk.values()))} ({', '.join(parts)})",
    ]
    for saving in made.savings:
        lines.append(f"changed to fit: {saving.setting} = {saving.value} saves {_size(saving.saves_bytes)}; costs {saving.costs}")
    return lines + [f"note: {note}" for note in made.notes]


def _size(count: float) -> str:
    """Bytes in the unit in which they can be read."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 2 else f"{count / 2**20:.1f} MiB"
