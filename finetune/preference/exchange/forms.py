"""Import and export by the name of the form."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import BadInput, DataError

from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.exchange.hpd import read_hpd, write_hpd
from finetune.preference.exchange.imagereward import read_imagereward, write_imagereward
from finetune.preference.exchange.imported import Importer, ImportReport
from finetune.preference.exchange.native import import_native, write_native
from finetune.preference.exchange.pick_a_pic import read_pick_a_pic, write_pick_a_pic

READERS = {"pick-a-pic": read_pick_a_pic, "hpd": read_hpd, "imagereward": read_imagereward}
WRITERS = {"native": write_native, "pick-a-pic": write_pick_a_pic, "hpd": write_hpd, "imagereward": write_imagereward}
FORMS = tuple(WRITERS)


def check_form(form: str) -> None:
    """Raises BadInput for a form that is not known."""
    if form not in FORMS:
        raise BadInput(f"the form {form!r} is not one of {', '.join(FORMS)}", where="--form")


def import_judgements(root: Path, path: Path, form: str, pictures: Path | None = None) -> ImportReport:
    """Bring a file's judgements and pictures into the candidate folder `root` (made where it does not exist).

    pictures: where the file's picture paths begin; its own folder by default.
    """
    check_form(form)
    folder = CandidateFolder.to_fill(root)
    if form == "native":
        return import_native(folder, path, pictures)
    entries = READERS[form](path)
    # A mistake anywhere in a JSON file refuses the file before anything is imported; Parquet is too large to hold.
    return Importer(folder, form, pictures or path.parent).take(entries if form == "pick-a-pic" else list(entries))


def export_judgements(root: Path, path: Path, form: str) -> tuple[int, list[tuple[str, str]]]:
    """Write the standing judgements of a folder; (written, what does not fit the form). Repeats are not exported."""
    check_form(form)
    folder = CandidateFolder.existing(root)
    if folder.owns(path):
        raise BadInput("this file belongs to the candidate folder itself", where=str(path), fix="name another file")
    judgements = [judgement for judgement in folder.judgements() if not judgement.repeat]
    if not judgements:
        raise DataError("there are no judgements yet", where=str(root), fix="rate some pairs first: brushwork prefer rate")
    return WRITERS[form](path, folder, judgements)
