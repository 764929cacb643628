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
    for verb in (candidates, rate, summary, reward, train):
        group.command()(verb)
    group.command("import")(import_file)
    group.command("export")(export_file)
    app.add_typer(group, name="prefer")


def candidates(
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="`mini`, a folder in diffusers layout, or a Hub id.")],
    prompts: Annotated[Path, typer.Option("--prompts", metavar="FILE", help="One prompt a line, or JSON Lines with prompt, prompt_id, negative.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of candidates; what is there already is not drawn again.")],
    per_prompt: Annotated[int, typer.Option("--per-prompt", metavar="N", min=1, max=10_000, help="Seeds a prompt.")] = 4,
    adapter: Annotated[list[str] | None, typer.Option("--adapter", "-a", metavar="FILE[:WEIGHT]", help="Draw with this adapter; several options draw with one after the other, + joins some, `base` is none.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub branch, tag or commit of the base.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The first seed.")] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="Sampler steps.")] = 30,
    guidance: Annotated[float, typer.Option("--guidance", min=0, max=100, help="Classifier-free guidance; 1 is off.")] = 5.0,
    height: Annotated[int | None, typer.Option("--height", help="Pixels; left out: the model's own.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels; left out: the model's own.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=1024, help="Pictures drawn at once.")] = 8,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Draw pictures to be rated, each with everything needed to make it again."""
    from finetune.families.base_models import refuse_unusable
    from finetune.preference.candidate_requests import parse_variants, read_prompts

    wanted, variants = read_prompts(prompts), parse_variants(adapter or [])
    refuse_unusable(base)

    from finetune.preference.candidates import CandidateSettings, make_candidates
    from finetune.preference.loaded_base import LoadedBase

    settings = CandidateSettings(per_prompt, seed, variants, steps, guidance, height, width, batch_size)
    report = make_candidates(LoadedBase.named(base, revision), wanted, settings, out, progress_for(quiet))
    data = {"candidates": [{"id": one.id, "prompt": one.prompt, "seed": one.seed, "path": out / one.path} for one in report.candidates], "drawn": report.drawn, "sheets": report.sheets}
    lines = [f"{len(report.candidates)} candidates in {out}, {report.drawn} drawn now", f"next: brushwork prefer rate {out} --annotator NAME"]
    emit(data, lines, json=json)


def reward(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The reward file, .safetensors; a .json with the same name describes it.")],
    features: Annotated[str, typer.Option("--features", help="What the judge looks at: latents or dit (of the base), clip (with --clip), pixels.")] = "latents",
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Base of latents and dit; left out: the one that drew the candidates.")] = None,
    clip: Annotated[str | None, typer.Option("--clip", metavar="MODEL", help="CLIP or SigLIP model, a folder or Hub id.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the folds.")] = 0,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Learn a reward from the comparisons in DIR and say how good it is on prompts it has not seen."""
    from dataclasses import asdict

    from finetune.preference.candidate_folder import CandidateFolder
    from finetune.preference.rewards.references import check_features

    known = CandidateFolder.existing(folder)
    drawn_by = next((one.base for one in known.candidates().values() if one.base), None)
    check_features(features, base=base or drawn_by, model=clip)

    from finetune.preference.rewards.features import build_features
    from finetune.preference.rewards.preference_head import train_reward

    # The witness must look at something else than the judge.
    other = build_features("latents", base=base or drawn_by) if features == "pixels" and (base or drawn_by) else None
    report = train_reward(known, build_features(features, base=base or drawn_by, model=clip), out, witness_features=other, seed=seed, progress=progress_for(quiet))
    interval = "no interval for so few prompts" if report.accuracy_interval is None else f"{report.accuracy_interval[0]:.0%} to {report.accuracy_interval[1]:.0%}"
    ceiling = "" if report.ceiling is None else f"; annotators' agreement allows {report.ceiling:.0%}"
    lines = [f"{report.file}: right about {report.accuracy:.0%} of unseen pairs ({interval}, n = {report.pairs}){ceiling}", f"calibration error {report.calibration_error:.3f}"]
    emit({"reward": report.file, **asdict(report)}, [*lines, *(f"warning: {warning}" for warning in report.warnings)], json=json)


def train(
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="The folder of candidates (and for dpo of comparisons).")],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run folder.")],
    method: Annotated[str, typer.Option("--method", help="dpo: from comparisons alone; grpo: policy gradient; draft or refl: gradients of the reward.")] = "dpo",
    reward: Annotated[str | None, typer.Option("--reward", metavar="FILE", help="Reward file, measure:NAME, pickscore, clip, siglip; hpsv2:FOLDER or imagereward:FOLDER for converted weights; several as 0.7*FILE+0.3*pickscore.")] = None,
    witness: Annotated[str | None, typer.Option("--witness", metavar="FILE", help="A second reward that is only watched; a fall of it stops the run.")] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Left out: the base that drew the candidates.")] = None,
    start: Annotated[Path | None, typer.Option("--adapter", metavar="FILE", help="Adapter to start from; it becomes the reference and part of the result.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps, for grpo rounds.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the run.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; an unknown one lists them all.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Train an adapter on preferences, near its base; stops by itself where the reward is being cheated."""
    from finetune.preference.candidate_folder import CandidateFolder
    from finetune.families.base_models import refuse_unusable
    from finetune.preference.policy.settings import build_settings
    from finetune.preference.rewards.references import check_reward

    drawn_by = next((one.base for one in CandidateFolder.existing(data).candidates().values() if one.base), None)
    settings = build_settings({
        "method": method, "data": str(data), "reward": reward, "witness": witness, "base": base or drawn_by, "start": None if start is None else str(start), "steps": steps, "seed": seed,
    }, changes or [])
    for option, reference in (("--reward", settings.reward), ("--witness", settings.witness)):
        if reference is not None:
            check_reward(reference, option)
    refuse_unusable(settings.base)

    from finetune.preference.policy.run import train_preference

    result = train_preference(settings, out, resume=resume, progress=progress_for(quiet))
    lines = [f"{result.adapter}: step {result.best_step}, divergence {result.kl:.2f} nats a picture", f"sheet  {result.sheet}"]
    if result.reward_before is not None:
        lines.insert(1, f"reward on held-out prompts {result.gain_line()}")
    if result.stopped:
        lines.append(f"stopped by the guard: {result.stopped}")
    lines += [f"left out: {place}: {reason}" for place, reason in result.left_out]
    emit(result.as_json(), lines, json=json)


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
    known = candidates.candidates()
    lines += [f"first of {known[first.item].prompt[:60]!r}: {known[first.item].path} ({first.strength:+.2f}, {first.low:+.2f} to {first.high:+.2f})" for first, *_ in pictures.values()]
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
