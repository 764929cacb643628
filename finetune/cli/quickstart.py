"""`brushwork quickstart`: the whole job on the embedded model, on a CPU, in about two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.output import Json, Quiet, emit, progress_for
from finetune.cli.run_arguments import Changes, free_run_folder
from finetune.cli.train import result_data

if TYPE_CHECKING:
    from finetune.quickstart import QuickstartResult


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("quickstart")(quickstart)


def quickstart(
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Run folder; left out: a new one under runs/.")] = None,
    changes: Changes = None, json: Json = False, quiet: Quiet = False,
) -> None:
    """The whole job on the bundled pictures, on a CPU."""
    run = out or free_run_folder("quickstart")
    progress = progress_for(quiet)
    progress.say("learning a style from 48 bundled pictures, on the embedded model; about two minutes on two cores")
    progress.say(f"run folder: {run}")

    from finetune.quickstart import quickstart as run_quickstart

    result = run_quickstart(run, progress, changes)
    measured = {
        "palette_distance": {"before": result.palette[0], "after": result.palette[1]},
        "shape_score": {"before": result.shape[0], "after": result.shape[1], "chance": result.chance}, "held_out_subjects": result.subjects,
    }
    emit({**result_data(result.training), "seconds": result.seconds, **measured}, _lines(result), json=json)


def _lines(result: QuickstartResult) -> list[str]:
    from finetune.mini_base import TRIGGER

    proof = result.training.verified
    return [
        "",
        f"before and after  {result.training.sheet}",
        f"report            {result.training.run / 'report.html'}",
        f"adapter           {result.training.adapter}",
        f"proof             {proof.placed} of {proof.keys} tensors loaded back, output changed by {proof.change:.0%}, base restored exactly",
        f"time              {result.seconds:.0f} s, peak memory {result.training.peak_memory_bytes / 2**20:.0f} MiB",
        "",
        f"measured on {result.subjects} subjects that were not trained, against how the style really draws them:",
        f"  colours: distance {result.palette[0]:.2f} before, {result.palette[1]:.2f} after (0 is the same, 1 is nothing in common)",
        f"  shapes: the nearest true picture is the right subject's for {result.shape[0]:.0%} before, {result.shape[1]:.0%} after (chance {result.chance:.0%})",
        "",
        f'next: brushwork generate --base mini --adapter {result.training.adapter} --prompt "{TRIGGER}, a rocket"',
    ]
