"""The native form as one file: candidate lines and judgement lines, with pictures found relative to the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.atomic_files import write_bytes, write_text
from data_tools.errors import BrushworkError, DataError
from data_tools.images import decode, read_bytes

from data_tools.near_names import meant_path
from finetune.preference.candidate_folder import Candidate, CandidateFolder, candidate_from_record
from finetune.preference.comparisons import Judgement, event_from_record
from finetune.preference.exchange.imported import ImportReport
from finetune.preference.journal import Journal


def import_native(folder: CandidateFolder, path: Path, pictures: Path | None = None) -> ImportReport:
    """Take the candidates and events of another file. Events keep their ids, so importing twice changes nothing.

    A `candidates.jsonl` beside the file is read too. Candidates that this folder has already are kept as they are.
    Raises DataError for a file that is not in the native form, or that names pictures which are nowhere.
    """
    if not path.is_file():
        raise DataError("no such file", where=str(path), fix=meant_path(path, "give the file with the judgements"))
    report, lines = ImportReport("native"), Journal(path).read_new()
    beside = path.with_name("candidates.jsonl")
    described = Journal(beside).read_new() if beside != path and beside.is_file() else []
    candidates = [candidate_from_record(record, where) for where, record in described + lines if record.get("event") == "candidate"]
    events = [(where, event_from_record(record, where)) for where, record in lines if record.get("event") != "candidate"]
    for candidate in candidates:
        _add(folder, candidate, pictures or path.parent, report)
    log, known = folder.log(), folder.candidates()
    for where, event in events:
        missing = [item for item in getattr(event, "items", ()) if item not in known]
        if missing:
            report.left_out.append((where, f"the candidate {missing[0]!r} is unknown here"))
        elif log.knows(event.id):
            report.already_there += 1
        else:
            log.append(event)
            report.judgements += 1
    if report.left_out and not report.judgements and not report.already_there:
        raise DataError(f"none of {len(report.left_out)} entries could be imported; the first: {report.left_out[0][1]}", where=report.left_out[0][0],
                        fix="its picture paths begin beside the file; say with --pictures FOLDER where else")
    return report


def _add(folder: CandidateFolder, candidate: Candidate, pictures: Path, report: ImportReport) -> None:
    if candidate.id in folder.candidates():
        return
    source = pictures / candidate.path
    try:
        content = read_bytes(source)
        decode(content, source.name)
        target = folder.pictures / (hashlib.sha256(content).hexdigest()[:24] + source.suffix)
        write_bytes(target, content)
        folder.add(replace(candidate, path=str(target.relative_to(folder.root))))
        report.candidates += 1
    except (OSError, BrushworkError) as error:
        report.left_out.append((candidate.id, f"its picture {candidate.path!r} cannot be read ({type(error).__name__})"))


def write_native(path: Path, folder: CandidateFolder, judgements: Sequence[Judgement]) -> tuple[int, list[tuple[str, str]]]:
    """Candidate lines, then judgement lines. Picture paths are relative to the file; where the file does not lie above the
    folder, the pictures are copied beside it."""
    named = {item for judgement in judgements for item in judgement.items}
    chosen = [candidate for candidate in folder.candidates().values() if candidate.id in named]
    if not folder.root.resolve().is_relative_to(path.resolve().parent):
        chosen = [_copied(folder, candidate, path.parent / f"{path.stem}_pictures") for candidate in chosen]
    else:
        chosen = [replace(candidate, path=os.path.relpath(folder.picture(candidate), path.parent)) for candidate in chosen]
    records = [candidate.to_record() for candidate in chosen] + [judgement.to_record() for judgement in judgements]
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return len(judgements), []


def _copied(folder: CandidateFolder, candidate: Candidate, pictures: Path) -> Candidate:
    source = folder.picture(candidate)
    target = pictures / source.name
    write_bytes(target, source.read_bytes())
    return replace(candidate, path=f"{pictures.name}/{target.name}")
