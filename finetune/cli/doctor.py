"""`brushwork doctor`: what this machine and this installation can do."""

from __future__ import annotations

import typer

from finetune.cli.output import Json, Quiet, emit


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor")(doctor)


def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Check versions, devices, memory and disk. Exits with 1 when something stands in the way."""
    from finetune.doctor import examine, summary

    findings = examine()
    lines, group = [], None
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines.append(group)
        lines.append(f"  {'ok ' if finding.ok else 'NO '} {finding.name}: {finding.value}")
        if not finding.ok:
            lines.append(f"       {finding.fix}")
    emit(summary(findings), lines, json=json)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
