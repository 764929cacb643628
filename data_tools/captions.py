"""Caption a folder: ask a captioner, clean what it says, write it beside the pictures at once, and go on after a stop.

A person's caption is never overwritten unless that is asked for by name. What a model wrote is kept in a log
(`layouts.caption_log`), so that a later run knows which captions are a model's and which pictures are done.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.atomic_files import write_text
from data_tools.caption_cleanup import clean_answer
from data_tools.caption_prompts import CaptionPrompt
from data_tools.captioners import Answer, Captioner, Request
from data_tools.errors import DataError
from data_tools.layouts.caption_files import FilesBeside, clean_line, read_text
from data_tools.layouts.caption_log import append_to_log, read_log
from data_tools.progress import Progress
from data_tools.records import ImageRecord, LeftOut, best_caption, shown_name
from data_tools.thinking import thinking_path, write_record
from data_tools.thinking_from_pictures import thinking_record

OVERWRITE = ("never", "model", "all")
ATTEMPTS = 3  # answers asked for before a picture is listed as failed
CONTAINER_LAYOUTS = frozenset({"zip", "webdataset", "tencent-arrow", "datasets"})
ROW_LAYOUTS = frozenset({"metadata", "index"})


@dataclass
class CaptionReport:
    """written: picture -> caption.  kept: pictures that had one and kept it.  failed: pictures without, and why.

    Every picture is in exactly one of the three.  tokens_in, tokens_out: as the model counted.  seconds: wall clock.
    """

    written: dict[Path, str] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    failed: list[LeftOut] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Captions per second."""
        return len(self.written) / self.seconds if self.seconds else 0.0

    def cost(self, price_in: float, price_out: float) -> float:
        """Money, from prices per million tokens."""
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


@dataclass
class _Job:
    record: ImageRecord
    target: Path


def caption_pictures(
    records: Sequence[ImageRecord], captioner: Captioner, prompt: CaptionPrompt, *, overwrite: str = "never", trigger: str | None = None, placement: str = "prefix",
    beside: bool = False, progress: Progress = Progress(),
) -> CaptionReport:
    """Write a caption file beside every picture that lacks one (or whose caption may be replaced).

    overwrite: "never", "model" (replace what a model wrote with other settings) or "all" (a person's too).
    trigger: words to put into each caption, see `with_trigger`.  beside: write <stem>.<language>.txt and leave <stem>.txt alone.
    Raises DataError for sets whose captions do not lie beside their pictures, and what the captioner raises for good.
    """
    jobs, report = _jobs(records, captioner, prompt, overwrite, beside)
    started = time.monotonic()
    try:
        with progress.phase(f"captioning ({captioner.name} {captioner.model})".replace(" )", ")"), len(jobs)) as advance:
            for attempt in range(ATTEMPTS):
                jobs = _round(jobs, captioner, prompt, attempt, trigger, placement, report, advance)
    finally:
        report.seconds = time.monotonic() - started
    return report


def _jobs(records: Sequence[ImageRecord], captioner: Captioner, prompt: CaptionPrompt, overwrite: str, beside: bool) -> tuple[list[_Job], CaptionReport]:
    if overwrite not in OVERWRITE:
        raise DataError(f"overwrite is {overwrite!r}", fix=f"one of {', '.join(OVERWRITE)}")
    require_beside(records, overwriting=overwrite != "never")
    report, jobs, files = CaptionReport(), [], FilesBeside()
    done = _done(records, captioner, prompt)
    for record in records:
        language = prompt.language if beside else None
        known = best_caption(record.captions, "thinking" if prompt.schema else "plain", language)
        target = files.there(caption_target(record, records, prompt, beside))
        finished = done.get(target) == record.content_hash and known is not None and known.source != "person"
        replaceable = overwrite == "all" or (overwrite == "model" and (known is None or known.source != "person"))
        if (known is not None and known.source != "folder_name" and not replaceable) or finished:
            report.kept.append(record.path)
        elif (known is None or known.source == "folder_name") and overwrite != "all" and (reason := _unread(target)):
            report.failed.append(LeftOut(record.path, reason, "no_caption"))
        else:
            jobs.append(_Job(record, target))
    return jobs, report


def _unread(target: Path) -> str | None:
    """Why a file that is to be written must stay: it holds words, of a person as far as one can tell, that could not be read."""
    if not target.is_file() or not target.stat().st_size:
        return None
    try:
        return f"{shown_name(target.name)} has words already that were not taken; look at it, or allow --overwrite all" if clean_line(read_text(target)) else None
    except (DataError, OSError) as error:
        return f"{shown_name(target.name)} has content that cannot be read ({getattr(error, 'what', None) or error.strerror}); mend it, or allow --overwrite all"


def require_beside(records: Iterable[ImageRecord], *, overwriting: bool) -> None:
    """Raise DataError for layouts where a file beside the picture would not be read again."""
    for record in records:
        if record.layout in CONTAINER_LAYOUTS:
            raise DataError(f"captions cannot be written into a {record.layout} set", where=shown_name(record.path), fix="convert it to a folder first: `brushwork data convert SOURCE --to sidecars --out FOLDER`")
        if overwriting and record.layout in ROW_LAYOUTS and record.caption:
            raise DataError("the captions stand in the set's index file, which outranks files beside pictures", where=shown_name(record.path), fix="edit that file, or convert the set with `--to sidecars`")


def caption_target(record: ImageRecord, records: Sequence[ImageRecord], prompt: CaptionPrompt, beside: bool) -> Path:
    """The file that a caption goes to. Pictures that share a stem get files with their full names."""
    if prompt.schema:
        return thinking_path(record.path)
    middle = f".{prompt.language}" if beside else ""
    twins = sum(other.path.with_suffix("") == record.path.with_suffix("") for other in records) if _may_have_twin(record) else 1
    base = record.path.name if twins > 1 and not middle else record.path.stem
    return record.path.with_name(f"{base}{middle}.txt")


def _may_have_twin(record: ImageRecord) -> bool:
    return any(text.startswith("shares its caption file") for text in record.warnings)


def _done(records: Sequence[ImageRecord], captioner: Captioner, prompt: CaptionPrompt) -> dict[Path, str]:
    """Caption file -> content hash of the picture it was made for, for this captioner, model and prompt."""
    found = {}
    for folder in {record.path.parent for record in records}:
        for entry in read_log(folder):
            if (entry.get("by"), entry.get("model"), entry.get("prompt")) == (captioner.name, captioner.model, prompt.identifier):
                found[folder / str(entry.get("file"))] = str(entry.get("picture"))
    return found


def _round(jobs: list[_Job], captioner: Captioner, prompt: CaptionPrompt, attempt: int, trigger: str | None, placement: str, report: CaptionReport, advance) -> list[_Job]:
    """Ask once for each job; return those whose answers could not be used and may be asked again."""
    again = []
    for request, answer in captioner.answers(_requests(jobs, prompt, attempt)):
        job = jobs[request.number]
        report.tokens_in += answer.tokens_in
        report.tokens_out += answer.tokens_out
        text, problem = _use(job, answer, captioner, prompt, trigger, placement)
        if not problem:
            report.written[job.record.path] = text
            advance(1)
        elif attempt + 1 < ATTEMPTS and captioner.follows_prompts and not answer.problem:
            again.append(job)
        else:
            report.failed.append(LeftOut(job.record.path, problem, "no_caption"))
            advance(1)
    return again


def _requests(jobs: list[_Job], prompt: CaptionPrompt, attempt: int) -> Iterator[Request]:
    for number, job in enumerate(jobs):
        yield Request(number, job.record.path, prompt.system, prompt.again if attempt else prompt.question, attempt, prompt.schema)


def _use(job: _Job, answer: Answer, captioner: Captioner, prompt: CaptionPrompt, trigger: str | None, placement: str) -> tuple[str, str]:
    """Write what can be written; return (caption, problem)."""
    if answer.problem:
        return "", answer.problem
    entry = {"by": captioner.name, "model": captioner.model, "prompt": prompt.identifier, "picture": job.record.content_hash, "file": job.target.name, "raw": answer.text}
    if prompt.schema:
        record, problem = thinking_record(answer.text, prompt.language, trigger=trigger, backend=captioner.name, model=captioner.model)
        if record is None:
            return "", problem
        write_record(job.target, record)
        append_to_log(job.target.parent, entry | {"text": record.enhanced})
        return record.enhanced, ""
    cleaned = clean_answer(answer.text, cut=answer.cut)
    if cleaned.problem:
        return "", cleaned.problem
    text = with_trigger(cleaned.text, trigger, placement)
    # the log first: after a stop between the two, the file is missing and is made again; never a model's text that looks like a person's
    append_to_log(job.target.parent, entry | {"text": text})
    write_text(job.target, text + "\n")
    return text, ""


def with_trigger(text: str, trigger: str | None, placement: str = "prefix") -> str:
    """Put the trigger before ("prefix") or after ("suffix") a caption, or where a template says ("{trigger}: {caption}").

    A caption that has the trigger already, in any case, is left as it is.
    """
    if not trigger or trigger.casefold() in text.casefold():
        return text
    comma = "，" if any("\u4e00" <= c <= "\u9fff" for c in trigger + text[:1]) else ", "
    templates = {"prefix": f"{{trigger}}{comma}{{caption}}", "suffix": f"{{caption}}{comma}{{trigger}}"}
    template = templates.get(placement, placement)
    if "{trigger}" not in template or "{caption}" not in template:
        raise DataError(f"the placement {placement!r} is neither prefix nor suffix nor a template", fix="a template holds {trigger} and {caption}")
    return template.replace("{caption}", text).replace("{trigger}", trigger) if text else trigger
