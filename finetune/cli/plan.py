"""`brushwork plan`: time and memory before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.errors import BrushworkError
from finetune.cli.output import Json, Quiet, emit, progress_for
from finetune.cli.run_arguments import Base, Changes, RecipeName, Target, Trigger, wanted_recipe

if TYPE_CHECKING:
    from finetune.training.plan import Plan


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
    """Memory, time and disk of a run, before it starts. With --fit, what is given with --set stays as it is."""
    wanted = wanted_recipe(target, base, recipe, trigger, changes, needs_pictures=False)
    progress = progress_for(quiet)
    for note in wanted.notes:
        progress.say(note)

    from finetune.training.byte_sizes import size_in_bytes
    from finetune.training.early_checks import check_plan

    most = None if fit is None else size_in_bytes(fit)
    scans = check_plan(wanted.recipe, progress)

    from finetune.training.plan import plan as make_plan
    from finetune.training.plan_fit import changes as changed_settings, refusal

    fixed = {change.partition("=")[0].strip() for change in changes or []}
    made = make_plan(wanted.recipe, fit=most, fixed=fixed, processes=processes, progress=progress, scans=scans)
    lines = _lines(made)
    if made.savings and made.fits:
        lines.append("train so with: " + " ".join(f"--set {change}" for change in changed_settings(made)))
    emit(made.as_json(), lines, json=json)
    if fit is not None and not made.fits:
        what, way_out = refusal(made, fixed)
        if json:
            raise typer.Exit(1)  # the one object that is printed says "fits": false
        raise BrushworkError(what, where=f"--fit {fit}", fix=way_out)


def _lines(made: Plan) -> list[str]:
    from finetune.training.byte_sizes import size_text
    from finetune.training.plan_fit import host_need

    parts, busiest = made.peak_parts_bytes, max(made.phases_bytes, key=made.phases_bytes.get)
    width = max(map(len, parts))
    disk = {name: size for name, size in made.disk_bytes.items() if name != "total" and size}
    settings, sizes = made.settings, [f"{width}x{height}" for height, width in made.settings["sizes"]]
    on_disk = [f"{name.replace('_', ' ')} {size_text(size)}" for name, size in disk.items()]
    lines = [
        f"{made.parameters:,} parameters, {made.trainable:,} of them trained, on {made.device}",
        f"settings: weights {settings['hold']}, {settings['checkpointed_blocks']} of {settings['blocks']} blocks checkpointed, batch {settings['batch_size']} x {settings['accumulation']}, "
        f"{settings['kind']} of rank {settings['rank']}, {settings['optimizer']}, pictures of {', '.join(sizes[:4])}{f' and {len(sizes) - 4} more sizes' if len(sizes) > 4 else ''}",
        f"memory: {size_text(made.memory_bytes['peak'])} of {size_text(made.budget_bytes)}: {'fits' if made.fits_device else 'DOES NOT FIT'} (the most of it while: {busiest})",
        *(f"  {name.replace('_', ' '):{width}}  {size_text(size)}" for name, size in parts.items()),
        "other times: " + ", ".join(f"{phase} {size_text(size)}" for phase, size in made.phases_bytes.items() if phase != busiest),
        *([f"and {host_need(made)}: {'fits' if made.fits_host else 'DOES NOT FIT'}"] if made.host_bytes else []),
        f"a step: {made.seconds_per_step:.2f} s, {made.flops_per_step / 1e12:.2f} TFLOP",
        f"disk: {size_text(sum(disk.values()))} ({', '.join(on_disk)})",
    ]
    for saving in made.savings:
        lines.append(f"{'changed to fit' if made.fits else 'changed'}: {saving.setting} = {saving.value} saves {size_text(saving.saves_bytes)}; costs {saving.costs}")
    return lines + [f"note: {note}" for note in made.notes]
