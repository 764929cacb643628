"""The folder that preference work lives in: candidate pictures, what made them, and what people said about them.

    candidates.jsonl      one line a picture: everything needed to make it again
    pictures/             the pictures
    comparisons.jsonl     judgements (see `comparisons`)
    rating_plan.json      which pictures are shown together (see `rating_plan`)
    sheets/               a contact sheet a prompt
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_tools.errors import DataError

from data_tools.near_names import meant_path
from finetune.preference.comparisons import ComparisonLog, Judgement
from finetune.preference.journal import Journal

OWN_NAMES = frozenset({"candidates.jsonl", "candidates.jsonl.torn", "comparisons.jsonl", "comparisons.jsonl.torn", "rating_plan.json", "pictures", "sheets"})


@dataclass(frozen=True)
class Candidate:
    """One picture and everything needed to make it again.

    path: relative to the folder.  seed None: the picture was imported, its making is unknown.
    adapters: [{"name", "sha256", "weight"}].  scheduler: class and configuration that drew it.
    """

    id: str
    prompt_id: str
    prompt: str
    path: str
    seed: int | None = None
    negative: str = ""
    base: str | None = None
    revision: str | None = None
    family: str | None = None
    adapters: tuple[Mapping[str, Any], ...] = ()
    steps: int | None = None
    guidance: float | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    image_sha256: str | None = None
    source: str | None = None

    def to_record(self) -> dict[str, Any]:
        """The line's object."""
        return {"v": 1, "event": "candidate", **asdict(self)}


def candidate_from_record(record: Mapping[str, Any], where: str) -> Candidate:
    """Check one line. Raises DataError for missing or mistyped fields; keys of later versions are left alone."""
    for key in ("id", "prompt_id", "path"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise DataError(f"`{key}` is {record.get(key)!r}; it must be text", where=where)
    if not isinstance(record.get("prompt"), str):
        raise DataError(f"`prompt` is {record.get('prompt')!r}; it must be text", where=where)
    path = Path(record["path"])
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"`path` {record['path']!r} leads out of the folder", where=where, fix="paths are relative to the folder of candidates.jsonl")
    known = {one.name for one in fields(Candidate)}
    values = {key: value for key, value in record.items() if key in known and value is not None}
    values["adapters"] = tuple(values.get("adapters", ()))
    return Candidate(**values)


class CandidateFolder:
    """The only one that knows the paths in a candidate folder."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self.pictures = self.root / "pictures"
        self.sheets = self.root / "sheets"
        self.plan = self.root / "rating_plan.json"
        self._journal = Journal(self.root / "candidates.jsonl")
        self._candidates: dict[str, Candidate] = {}

    @classmethod
    def existing(cls, root: Path | str) -> CandidateFolder:
        """A folder that has candidates. Raises DataError where there are none."""
        folder = cls(root)
        if not folder._journal.path.is_file():
            raise DataError("no candidates.jsonl here", where=str(root), fix=meant_path(root, "make candidates with `brushwork prefer candidates`, or import some"))
        if not folder.candidates():
            raise DataError("candidates.jsonl is empty", where=str(root), fix="make candidates with `brushwork prefer candidates`, or import some")
        return folder

    @classmethod
    def to_fill(cls, root: Path | str) -> CandidateFolder:
        """A folder that is new, empty or has candidates. Raises DataError for one that holds other things: among somebody's pictures, candidates
        would be trained."""
        folder = cls(root)
        if folder.root.is_dir() and not folder._journal.path.exists():
            others = [path.name for path in folder.root.iterdir() if path.name not in OWN_NAMES and not path.name.startswith(".")]
            if others:
                raise DataError("the folder holds other files and no candidates", where=str(root), fix="name a new folder")
        return folder

    def owns(self, path: Path) -> bool:
        """Whether this is one of the files of the folder itself."""
        inside, root = path.resolve(), self.root.resolve()
        return inside.is_relative_to(root) and inside != root and inside.relative_to(root).parts[0] in OWN_NAMES

    def candidates(self) -> dict[str, Candidate]:
        """Candidates by id, in the order in which they were made. Raises DataError naming the line."""
        for where, record in self._journal.read_new():
            candidate = candidate_from_record(record, where)
            if candidate.id in self._candidates and self._candidates[candidate.id] != candidate:
                raise DataError(f"the candidate {candidate.id!r} is described twice, differently", where=where)
            self._candidates[candidate.id] = candidate
        return self._candidates

    def add(self, candidate: Candidate) -> None:
        """Write one candidate's line; its picture is already in place."""
        if candidate.id not in self.candidates():
            self._journal.append(candidate.to_record())
            self.candidates()

    def by_prompt(self) -> dict[str, list[Candidate]]:
        """prompt id -> candidates."""
        groups: dict[str, list[Candidate]] = {}
        for candidate in self.candidates().values():
            groups.setdefault(candidate.prompt_id, []).append(candidate)
        return groups

    def picture(self, candidate: Candidate | str) -> Path:
        """The picture's path. Raises DataError where the file is gone."""
        if isinstance(candidate, str):
            candidate = self.candidates()[candidate]
        path = self.root / candidate.path
        if not path.is_file():
            raise DataError("the picture is gone", where=str(path), fix="put it back, or remove its line from candidates.jsonl")
        return path

    def log(self) -> ComparisonLog:
        """The judgements of this folder, read up to now."""
        return ComparisonLog(self.root / "comparisons.jsonl").refresh()

    def judgements(self) -> list[Judgement]:
        """Standing judgements. Raises DataError where one names a picture that the folder does not have."""
        judgements, known = self.log().judgements(), self.candidates()
        for judgement in judgements:
            for item in judgement.items:
                if item not in known:
                    raise DataError(f"the judgement {judgement.id!r} names the candidate {item!r}, which candidates.jsonl does not have", where=str(self.root / "comparisons.jsonl"))
        return judgements
