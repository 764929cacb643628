"""`brushwork data caption`: write captions by a model, an endpoint or the file name; or edit those that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.data_arguments import Fresh, ImageRoot, Layout, Source, Workers, scanned, source_folder
from finetune.cli.output import Json, Quiet, emit, progress_for

if TYPE_CHECKING:
    from data_tools.caption_prompts import CaptionPrompt
    from data_tools.captions import CaptionReport

MOST_SHOWN = 20  # captions shown on a terminal


def caption(
    source: Source,
    by: Annotated[str | None, typer.Option("--by", help="file-name, endpoint, vision-language (Qwen-VL and its like), florence-2, blip-2 or wd-tagger.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A folder or Hub id; for an endpoint the name that it knows.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Base address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1. Its key comes from OPENAI_API_KEY.")] = None,
    purpose: Annotated[str, typer.Option("--purpose", help="style: say what is in the picture, not the style. subject: the reverse. everything: both.")] = "style",
    subject: Annotated[str, typer.Option("--subject", help="What captions call the subject, with --purpose subject.")] = "the subject",
    language: Annotated[str, typer.Option("--language", help="en, zh, or both (the second goes into <picture>.zh.txt).")] = "en",
    question: Annotated[str | None, typer.Option("--question", help="Ask this instead of the usual question.")] = None,
    trigger: Annotated[str | None, typer.Option("--trigger", help="Write these words into each caption. Usually not needed: training adds the trigger.")] = None,
    placement: Annotated[str, typer.Option("--placement", help='Where the trigger goes: prefix, suffix, or a template such as "{caption} in {trigger}".')] = "prefix",
    thinking: Annotated[bool, typer.Option("--thinking", help="Make thinking records (elements, relations, reasoning) in <picture>.thinking.json instead of captions.")] = False,
    overwrite: Annotated[str, typer.Option("--overwrite", help="never: only pictures without a caption. model: also captions that a model wrote. all: a person's too.")] = "never",
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=256, help="Requests in flight at an endpoint.")] = 4,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=256, help="Pictures that a model on this machine sees at once.")] = 1,
    price: Annotated[str | None, typer.Option("--price", metavar="IN,OUT", help="Prices per million tokens, to show the cost.")] = None,
    prepend: Annotated[str | None, typer.Option("--prepend", help="Edit: put this before each caption.")] = None,
    append: Annotated[str | None, typer.Option("--append", help="Edit: put this after each caption.")] = None,
    replace: Annotated[list[str] | None, typer.Option("--replace", metavar="OLD=NEW", help="Edit: replace a text everywhere.")] = None,
    regex: Annotated[bool, typer.Option("--regex", help="OLD of --replace is a regular expression.")] = False,
    drop: Annotated[list[str] | None, typer.Option("--drop", help="Edit: remove this tag (part between commas). Can be given several times.")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Edit: shuffle the parts between commas.")] = False, keep_tokens: Annotated[int, typer.Option("--keep-tokens", min=0, help="First parts that --shuffle leaves in place.")] = 0,
    keep_first: Annotated[int | None, typer.Option("--keep-first", min=1, help="Edit: keep this many parts.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of --shuffle.")] = 0, dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done.")] = False, undo: Annotated[bool, typer.Option("--undo", help="Take back the last edit.")] = False,
    layout: Layout = "auto", image_root: ImageRoot = None, workers: Workers = None, fresh: Fresh = False, json: Json = False, quiet: Quiet = False,
) -> None:
    """Caption the pictures that have none, or edit the captions that are there. Files are written beside the pictures."""
    from data_tools.errors import BadInput

    rules = _rules(prepend, append, replace, regex, drop, shuffle, keep_tokens, keep_first, seed)
    if (by is not None) + bool(rules) + undo != 1:
        raise BadInput("say one of: who writes captions (--by), how to edit them (--prepend, --append, --replace, --drop, --shuffle, --keep-first), or --undo", fix='for example `brushwork data caption FOLDER --by file-name`')
    _refuse_idle(("--price", price, by == "endpoint", "--by endpoint"), ("--url", url, by == "endpoint", "--by endpoint"), ("--model", model, by not in (None, "file-name"), "a --by that has a model"),
                 ("--trigger", trigger, by, "--by"), ("--question", question, by, "--by"), ("--thinking", thinking, by, "--by"), ("--regex", regex, replace, "--replace"),
                 ("--keep-tokens", keep_tokens, shuffle, "--shuffle"), ("--dry-run", dry_run, not undo, "--by or an edit"))
    if undo:
        _undo(source, json)
        return
    languages, prices = ([], None) if by is None else _check_questions(by, model, url, language, purpose, overwrite, trigger, placement, price)
    progress = progress_for(quiet)
    found = scanned(source, layout, image_root, workers, fresh, progress)
    if rules:
        _edit(found.records, rules, source, dry_run, json)
        return
    from data_tools.caption_prompts import caption_prompt, thinking_prompt
    from data_tools.captioners import BATCHED, captioner
    from data_tools.captions import caption_pictures

    writer = captioner(by, model=model, url=url, **({"concurrency": concurrency} if by == "endpoint" else {"batch_size": batch_size} if by in BATCHED else {}))
    if by == "endpoint" and not writer.is_local:
        progress.say(f"pictures, scaled down and without metadata, will be sent to {url}")
    reports = []
    for number, each in enumerate(languages):
        prompt = thinking_prompt(each) if thinking else caption_prompt(purpose, each, subject=subject, question=question)
        if dry_run:
            return _show_prompt(prompt if writer.follows_prompts else None, found.records, json)
        reports.append(caption_pictures(found.records, writer, prompt, overwrite=overwrite, trigger=trigger, placement=placement, beside=number > 0, progress=progress))
    _show(reports, prices, json)


def _refuse_idle(*options: tuple[str, Any, Any, str]) -> None:
    """Raises BadInput for an option (name, value, what must be true for it to do anything, how to say that) that would do nothing."""
    from data_tools.errors import BadInput

    for name, given, works, with_what in options:
        if given and not works:
            raise BadInput(f"does nothing without {with_what}", where=name, fix=f"add {with_what}, or leave {name} out")


def _check_questions(by: str, model: str | None, url: str | None, language: str, purpose: str, overwrite: str, trigger: str | None, placement: str,
                     price: str | None) -> tuple[list[str], tuple[float, float] | None]:
    """The languages to ask in and the prices. Raises BadInput for what no picture needs to be looked at to refuse."""
    from data_tools.caption_prompts import PURPOSES
    from data_tools.captioners import check_captioner
    from data_tools.captions import OVERWRITE, with_trigger
    from data_tools.errors import BadInput

    languages = {"en": ["en"], "zh": ["zh"], "both": ["en", "zh"]}
    for option, given, known in (("--language", language, languages), ("--purpose", purpose, PURPOSES), ("--overwrite", overwrite, OVERWRITE)):
        if given not in known:
            *others, last = known
            raise BadInput(f"{option} is {given!r}", fix=f"{', '.join(others)} or {last}")
    with_trigger("", trigger, placement)
    prices = _prices(price)
    check_captioner(by, model=model, url=url)
    return languages[language], prices


def _rules(prepend: str | None, append: str | None, replace: list[str] | None, regex: bool, drop: list[str] | None, shuffle: bool, keep_tokens: int, keep_first: int | None, seed: int) -> list:
    """Edit rules in a fixed order: replace, drop, shuffle, keep first, prepend, append."""
    from data_tools import caption_edits as edits
    from data_tools.errors import BadInput

    rules = []
    for text in replace or ():
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise BadInput(f"--replace {text!r} is not OLD=NEW")
        rules.append(edits.replace(old, new, regex=regex))
    rules += [edits.drop_parts(drop)] if drop else []
    rules += [edits.shuffle(keep_tokens, seed)] if shuffle else []
    rules += [edits.keep_first(keep_first)] if keep_first else []
    rules += [edits.prepend(prepend)] if prepend else []
    return rules + ([edits.append(append)] if append else [])


def _prices(price: str | None) -> tuple[float, float] | None:
    from data_tools.errors import BadInput

    if price is None:
        return None
    try:
        first, second = (float(part) for part in price.split(","))
    except ValueError:
        raise BadInput(f"--price is {price!r}", fix="two numbers, such as 0.15,0.60") from None
    return first, second


def _undo(source: str, json: bool) -> None:
    from data_tools.caption_edits import undo

    restored, left = undo(source_folder(source))
    lines = [f"restored {len(restored)} captions"] + [f"left as it is, because it was changed since: {path}" for path in left]
    emit({"restored": [str(p) for p in restored], "left": [str(p) for p in left]}, lines, json=json)


def _edit(records, rules, source: str, dry_run: bool, json: bool) -> None:
    from data_tools.caption_edits import apply_edits, not_in_files, plan_edits
    from data_tools.records import shown_name

    changes = plan_edits(records, rules)
    unreached = [str(record.path) for record in not_in_files(records)]
    written = None if dry_run or not changes else apply_edits(changes, source_folder(source))
    lines = [line for change in changes[:MOST_SHOWN] for line in (shown_name(change.path.name), f"  - {change.before}", f"  + {change.after}")]
    lines += [f"... and {len(changes) - MOST_SHOWN} more"] if len(changes) > MOST_SHOWN else []
    lines += [f"left as it is, because its caption is not in a .txt or .caption file of its own: {shown_name(path)}" for path in unreached[:MOST_SHOWN]]
    lines += [f"... and {len(unreached) - MOST_SHOWN} more such pictures; `brushwork data convert --to sidecars` gives each a file"] if len(unreached) > MOST_SHOWN else []
    lines.append(f"{len(changes)} captions would change" if dry_run else f"{len(changes)} captions changed" + ("; `--undo` takes it back" if changes else ""))
    emit({"changes": [{"path": str(c.path), "before": c.before, "after": c.after} for c in changes], "left": unreached, "dry_run": dry_run, "undo_file": written}, lines, json=json)


def _show_prompt(prompt: CaptionPrompt | None, records, json: bool) -> None:
    """prompt: None for a captioner that is asked nothing."""
    without = sum(record.caption is None for record in records)
    system, question = (prompt.system, prompt.question) if prompt else (None, None)
    lines = [text for text in (system, question) if text] + [f"{without} of {len(records)} pictures have no caption"]
    emit({"system": system, "question": question, "pictures": len(records), "without_caption": without}, lines, json=json)


def _show(reports: list[CaptionReport], prices: tuple[float, float] | None, json: bool) -> None:
    from data_tools.records import shown_name

    written = [(path, text) for report in reports for path, text in report.written.items()]
    failed = [item for report in reports for item in report.failed]
    kept = sum(len(report.kept) for report in reports)
    rate = len(written) / max(sum(report.seconds for report in reports), 1e-9)
    cost = sum(report.cost(*prices) for report in reports) if prices else None
    data = {
        "written": [{"path": str(p), "caption": t} for p, t in written], "kept": kept, "failed": [{"path": str(i.path), "reason": i.reason} for i in failed],
        "tokens_in": sum(r.tokens_in for r in reports), "tokens_out": sum(r.tokens_out for r in reports), "per_second": rate, "cost": cost,
    }
    lines = [f"{shown_name(path.name)}: {text}" for path, text in written[:MOST_SHOWN]]
    lines += [f"... and {len(written) - MOST_SHOWN} more"] if len(written) > MOST_SHOWN else []
    lines += [f"no caption: {shown_name(item.path)}: {item.reason}" for item in failed]
    spent = f", {data['tokens_in'] + data['tokens_out']:,} tokens" + (f", cost {cost:.4f}" if cost is not None else "") if data["tokens_out"] else ""
    lines.append(f"{len(written)} captions written ({rate:.1f} a second{spent}), {kept} pictures kept what they had, {len(failed)} failed")
    emit(data, lines, json=json)
