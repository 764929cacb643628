"""What every import shares: pictures are checked and copied, bad entries are listed, whole files are refused by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.atomic_files import write_bytes
from data_tools.errors import BrushworkError, DataError
from data_tools.images import decode, read_bytes

from data_tools.near_names import meant_path
from finetune.preference.candidate_folder import Candidate, CandidateFolder
from finetune.preference.comparisons import ComparisonLog, Judgement

LARGEST_JSON = 1 << 30


@dataclass(frozen=True)
class ForeignEntry:
    """One judgement of a foreign file before its pictures are in the folder.

    where: for error texts.  pictures: a path relative to the picture folder, or the file's bytes, in the order of
    `answer`'s positions.  answer: Judgement fields by position: choice (index) or None, tie, ranking.
    """

    where: str
    prompt: str
    pictures: tuple[str | bytes, ...]
    rater: str
    identity: str
    choice: int | None = None
    tie: bool = False
    ranking: tuple[int, ...] | None = None


@dataclass
class ImportReport:
    """What came in and what did not: left_out holds (place, reason)."""

    form: str
    candidates: int = 0
    judgements: int = 0
    already_there: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)


class Importer:
    """Puts foreign entries into a candidate folder, one at a time; importing the same file twice changes nothing."""

    def __init__(self, folder: CandidateFolder, form: str, pictures: Path):
        self.folder, self.pictures = folder, pictures
        self.log: ComparisonLog = folder.log()
        self.report = ImportReport(form)

    def take(self, entries: Iterable[ForeignEntry]) -> ImportReport:
        """Import all entries. Raises DataError where not a single one was usable."""
        for entry in entries:
            try:
                self._take_one(entry)
            except BrushworkError as error:
                self.report.left_out.append((entry.where, error.what))
        if self.report.left_out and not self.report.judgements and not self.report.already_there:
            place, reason = self.report.left_out[0]
            raise DataError(f"none of {len(self.report.left_out)} entries could be imported; the first: {reason}", where=place, fix="say where the pictures are with --pictures FOLDER")
        return self.report

    def _take_one(self, entry: ForeignEntry) -> None:
        identity = hashlib.sha256(f"{self.report.form}|{entry.identity}".encode()).hexdigest()[:32]
        if self.log.knows(identity):
            self.report.already_there += 1
            return
        prompt_id = "p" + hashlib.sha256(entry.prompt.encode()).hexdigest()[:12]
        contents = [self._content(picture) for picture in entry.pictures]
        items = tuple(_candidate_id(prompt_id, content) for content in contents)
        if len(set(items)) != len(items):
            raise DataError("the same picture twice in one judgement", where=entry.where)
        for item, content in zip(items, contents, strict=True):
            self._add(item, content, prompt_id, entry)
        judgement = Judgement(
            id=identity, rater=entry.rater, mode="rank" if entry.ranking else "pair", prompt_id=prompt_id, prompt=entry.prompt, items=items,
            choice=None if entry.choice is None else items[entry.choice], tie=entry.tie, ranking=entry.ranking,
        )
        self.log.append(judgement)
        self.report.judgements += 1

    def _content(self, picture: str | bytes) -> bytes:
        if isinstance(picture, bytes):
            return picture
        inside = Path(picture)
        if inside.is_absolute() or ".." in inside.parts:
            raise DataError(f"the picture path {picture!r} leads out of the picture folder")
        path = self.pictures / inside
        if not path.is_file():
            raise DataError(f"picture {picture!r} is not in the picture folder")
        return read_bytes(path)

    def _add(self, item: str, content: bytes, prompt_id: str, entry: ForeignEntry) -> None:
        if item in self.folder.candidates():
            return
        path = self.folder.pictures / f"{item}{_suffix(content)}"
        image, _ = decode(content, path.name)
        write_bytes(path, content)
        self.folder.add(Candidate(
            id=item, prompt_id=prompt_id, prompt=entry.prompt, path=str(path.relative_to(self.folder.root)), height=image.height, width=image.width,
            image_sha256=hashlib.sha256(content).hexdigest(), source=self.report.form,
        ))
        self.report.candidates += 1


def _candidate_id(prompt_id: str, content: bytes) -> str:
    return "c" + hashlib.sha256(prompt_id.encode() + hashlib.sha256(content).digest()).hexdigest()[:16]


SIGNATURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}


def _suffix(content: bytes) -> str:
    for signature, suffix in SIGNATURES.items():
        if content.startswith(signature):
            return suffix
    raise DataError("the picture is neither PNG nor JPEG nor WebP")


def read_json_list(path: Path) -> list[Any]:
    """The list in a JSON file. Raises DataError for anything else."""
    if not path.is_file():
        raise DataError("no such file", where=str(path), fix=meant_path(path, "give the file with the judgements"))
    if path.stat().st_size > LARGEST_JSON:
        raise DataError(f"{path.stat().st_size:,} bytes; the limit is {LARGEST_JSON:,}", where=str(path), fix="cut the file into parts")
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({str(error)[:120]})", where=str(path), fix="choose the form that the file has with --form") from None
    if not isinstance(content, list) or not content:
        raise DataError("a list of judgements is expected, and at least one", where=str(path), fix="choose the form that the file has with --form")
    return content


def entry_place(path: Path, number: int) -> str:
    """How an error names the n-th entry (from 1)."""
    return f"{path.name}, entry {number}"


def require(entry: Any, where: str, **kinds: type) -> Mapping[str, Any]:
    """The entry as a mapping whose named fields have these types. Raises DataError naming the field."""
    if not isinstance(entry, Mapping):
        raise DataError(f"a {type(entry).__name__} where an object is expected", where=where)
    for key, kind in kinds.items():
        if not isinstance(entry.get(key), kind) or isinstance(entry.get(key), bool):
            raise DataError(f"`{key}` is {str(entry.get(key))[:60]!r}; it must be a {kind.__name__}", where=where, fix="choose the form that the file has with --form")
    return entry


def require_ranks(values: list, count: int, name: str, where: str) -> tuple[int, ...]:
    """Ranks (1 is best) for `count` pictures. Raises DataError naming the field."""
    ranks = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf]
    if len(ranks) != len(values) or len(values) != count or count < 2:
        raise DataError(f"`{name}` must give each of the {count} pictures a rank", where=where)
    order = {rank: place for place, rank in enumerate(sorted(set(values)), 1)}
    return tuple(order[value] for value in values)


def require_paths(values: list, name: str, where: str) -> tuple[str, ...]:
    """Picture paths. Raises DataError naming the field."""
    if len(values) < 2 or not all(isinstance(value, str) and value for value in values):
        raise DataError(f"`{name}` must name two or more pictures", where=where)
    return tuple(values)
