"""`brushwork prefer candidates|rate|summary|reward|train|import|export`: learning from what people prefer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.output import Json, Quiet, command_group, emit, progress_for

if TYPE_CHECKING:
    from finetune.preference.agreement import Share, Trust

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of candidates and judgements.")]
FORM_HELP = "native, pick-a-pic (Parquet), hpd (JSON) or imagereward (JSON)."


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = command_group("Learn from what people prefer: draw candidates, rate them, train a reward and an adapter.")
    for verb in (rate, summary):
        group.command()(verb)
    group.command("import")(import_file)
    group.command("export")(export_file)
    app.add_typer(group, name="prefer")


def rate(
    folder: Folder,
    annotator: Annotated[str, typer.Option("--annotator", metavar="NAME", help="Who answers; every annotator has an order and progress of their own.")],
    mode: Annotated[str, typer.Option("--mode", help="pair: which of two; rank: order several; score: points from 1 to 5 on criteria.")] = "pair",
    questions: Annotated[int | None, typer.Option("--questions", metavar="N", help="How many questions; default: every picture about four times in pairs.")] = None,
    set_size: Annotated[int, typer.Option("--set-size", metavar="N", help="Pictures in a ranking, 2 to 9.")] = 4,
    repeats: Annotated[float, typer.Option("--repeats", metavar="SHARE", help="Share of pairs asked a second time, sides swapped, to measure consistency; 0 to 0.5.")] = 0.0,
    overlap: Annotated[float, typer.Option("--overlap", metavar="SHARE", help="Share of questions that every annotator answers; the rest are shared out. 0 to 1.")] = 1.0,
    criteria: Annotated[str, typer.Option("--criteria", metavar="A,B,...", help="Criteria of mode score.")] = "alignment,aesthetics,realism,style",
    seed: Annotated[int, typer.Option("--seed", help="Of the random order.")] = 0,
    host: Annotated[str, typer.Option("--host", help="Address to listen on. Only this machine can reach the default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; another free one is taken where it is in use.")] = 8642,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Open a local page on which people compare the pictures, blind and by keyboard. Ctrl-C ends it; nothing is lost."""
    from finetune.preference.candidate_folder import CandidateFolder
    from finetune.preference.rating_plan import PlanSettings
    from finetune.preference.rating_session import RatingSession, parse_criteria

    settings = PlanSettings(mode=mode, wanted=questions, set_size=set_size, repeats=repeats, overlap=overlap, seed=seed)
    session = RatingSession(CandidateFolder.existing(folder), annotator, settings, parse_criteria(criteria))
    _serve(session, host, port, browser)
    counts, figures = session.progress(), session.summary()
    line = f"{annotator}: {counts['answered']} of {counts['total']} answered, {counts['skipped']} skipped; saved in {folder / 'comparisons.jsonl'}"
    emit({"annotator": annotator, "mode": mode, **counts, "summary": figures, "comparisons": folder / "comparisons.jsonl"}, [line], json=json)


def _serve(session: Any, host: str, port: int, browser: bool) -> None:
    """Serve the page; its address goes to standard error even with --quiet, because nobody can guess the token."""
    import sys
    import webbrowser

    from finetune.preference.rating_page.guard import is_loopback
    from finetune.preference.rating_page.server import Address, serve

    def announce(address: Address) -> None:
        print(f"Rate here: {address.url}\nCtrl-C ends; every answer is on disk at once.", file=sys.stderr, flush=True)
        if not is_loopback(host):
            print("This page can be reached from other machines by whoever has the address.", file=sys.stderr, flush=True)
        if browser:
            webbrowser.open(address.url)

    serve(session, host, port, announce)


def summary(folder: Folder, json: Json = False, quiet: Quiet = False) -> None:
    """How far the judgements agree, with each other and with logic, and which pictures and adapters they put first."""
    from dataclasses import asdict

    from finetune.preference.agreement import trust
    from finetune.preference.candidate_folder import CandidateFolder
    from finetune.preference.standings import adapter_standings, picture_standings

    candidates = CandidateFolder.existing(folder)
    judgements = candidates.judgements()
    figures = trust(judgements)
    adapters, pictures = adapter_standings(candidates, judgements), picture_standings(candidates, judgements)
    data = {
        "judgements": figures.judgements, "trust": asdict(figures), "adapters": [asdict(standing) for standing in adapters],
        "prompts": {prompt: [asdict(standing) for standing in standings] for prompt, standings in pictures.items()},
    }
    lines = _trust_lines(figures)
    if len(adapters) > 1:
        lines += ["adapters, strongest first (log-odds against the average, 95 % interval):"]
        lines += [f"  {one.item}: {one.strength:+.2f} ({one.low:+.2f} to {one.high:+.2f}), {one.comparisons} comparisons" for one in adapters]
    lines += [f"first of {prompt}: {standings[0].item} ({standings[0].strength:+.2f}, {standings[0].low:+.2f} to {standings[0].high:+.2f})" for prompt, standings in pictures.items()]
    emit(data, lines, json=json)


def _trust_lines(figures: Trust) -> list[str]:
    lines = [f"{figures.judgements} judgements by {', '.join(f'{name} ({count})' for name, count in figures.by_annotator.items()) or 'nobody yet'}"]
    lines += [f"Krippendorff's alpha, {name}: {'no overlap' if value is None else f'{value:.2f}'}" for name, value in figures.alpha.items()]
    lines += [_share_line("annotators agree", figures.pair_agreement), _share_line("left one chosen", figures.left), _share_line("same answer when asked again", figures.consistency)]
    if figures.triads:
        lines.append(f"circular triples: {figures.cyclic} of {figures.triads}")
    return [line for line in lines if line]


def _share_line(name: str, share: Share) -> str:
    return "" if share.value is None else f"{name}: {share.value:.0%} ({share.low:.0%} to {share.high:.0%}, n = {share.trials})"


def import_file(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file with judgements.")],
    form: Annotated[str, typer.Option("--form", help=FORM_HELP)] = "native",
    pictures: Annotated[Path | None, typer.Option("--pictures", metavar="FOLDER", help="Where the file's picture paths begin; default: beside the file.")] = None,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Bring judgements and pictures from another data set into DIR."""
    from finetune.preference.exchange.forms import import_judgements

    report = import_judgements(folder, file, form, pictures)
    lines = [f"{report.judgements} judgements and {report.candidates} pictures imported, {report.already_there} were there already"]
    lines += [f"left out: {place}: {reason}" for place, reason in report.left_out]
    data = {"form": form, "judgements": report.judgements, "candidates": report.candidates, "already_there": report.already_there, "left_out": _as_reasons(report.left_out)}
    emit(data, lines, json=json)


def export_file(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    form: Annotated[str, typer.Option("--form", help=FORM_HELP)] = "native",
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Write the judgements of DIR in the form of another data set."""
    from finetune.preference.exchange.forms import export_judgements

    written, left_out = export_judgements(folder, file, form)
    lines = [f"{written} judgements written to {file}", *(f"left out: {place}: {reason}" for place, reason in left_out)]
    emit({"form": form, "file": file, "judgements": written, "left_out": _as_reasons(left_out)}, lines, json=json)


def _as_reasons(left_out: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"path": place, "reason": reason} for place, reason in left_out]
