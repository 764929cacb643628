"""`brushwork train`: a folder of pictures in, a proven adapter out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.errors import BadInput
from finetune.cli.output import Json, Quiet, emit, progress_for
from finetune.cli.run_arguments import Base, Changes, RecipeName, Target, Trigger, run_folder, wanted_recipe

if TYPE_CHECKING:
    from finetune.training.run import TrainingResult


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("train")(train)


def train(
    target: Target,
    base: Base = None, recipe: RecipeName = None, trigger: Trigger = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Run folder; left out: a new one under runs/.")] = None,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint of the run.")] = False,
    accept_change: Annotated[list[str] | None, typer.Option("--accept-change", metavar="SECTION.KEY", help="With --resume: a setting (or `data`) that may differ.")] = None,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Train an adapter, load it back and prove it."""
    if accept_change and not resume:
        raise BadInput("nothing is resumed, so there is no change to accept", where="--accept-change", fix="add --resume, or leave it out")
    wanted = wanted_recipe(target, base, recipe, trigger, changes)
    run = run_folder(wanted, out, resume)
    is_main = os.environ.get("RANK", "0") == "0"
    progress = progress_for(quiet or not is_main)
    for note in wanted.notes:
        progress.say(note)
    progress.say(f"run folder: {run}")

    from finetune.training.early_checks import check_run
    from finetune.training.run_folder import RunFolder

    scans = check_run(wanted.recipe, RunFolder(run), resume, accept_change or (), progress)

    from finetune.evaluation.validation import RunValidator
    from finetune.training.run import train as train_adapter

    samples = wanted.recipe.samples
    watch = RunValidator(stops=samples.stop_on_copies, most_drift=samples.most_drift) if samples.every else None
    result = train_adapter(wanted.recipe, run, resume=resume, progress=progress, accept_changes=accept_change or (), watch_samples=watch, scans=scans)
    if result is not None:
        emit(result_data(result), result_lines(result), json=json)


def result_data(result: TrainingResult) -> dict[str, Any]:
    """A finished run as JSON."""
    return {
        "run": result.run, "adapter": result.adapter, "steps": result.steps, "exported_step": result.exported_step, "ended": result.ended, "resumed_from": result.resumed_from, "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes, "verified": result.verified.as_json(), "sheet": result.sheet,
        "report": result.run / "report.html", "reasons": result.reasons,
        "held_out": list(result.held_out),
        "left_out": [{"path": left.path, "reason": left.reason} for left in result.left_out],
    }


def result_lines(result: TrainingResult) -> list[str]:
    """A finished run for people."""
    proof = result.verified
    lines = [
        f"adapter   {result.adapter}",
        f"proof     {proof.placed} of {proof.keys} tensors placed, output changed by {proof.change:.1%}, base restored exactly",
        f"pictures  {result.sheet}",
        f"report    {result.run / 'report.html'}",
        f"time      {result.steps} steps, {result.seconds:.0f} s {f'since step {result.resumed_from}' if result.resumed_from else 'in all'}, peak memory {result.peak_memory_bytes / 2**20:.0f} MiB",
    ]
    if "adapter" in result.reasons:
        lines.insert(1, f"exported  {result.reasons['adapter']}")
    if result.ended:
        lines.append(f"ended     early: {result.ended}")
    if result.held_out:
        lines.append(f"held out  {len(result.held_out)} pictures, never trained; the report names them")
    if result.left_out:
        lines.append(f"left out  {len(result.left_out)} pictures; the report says which and why")
    return lines
