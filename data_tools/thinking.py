"""A thinking record: what a picture or prompt holds, thought through before it is drawn.

Elements with counts and attributes, their relations, composition, environment, lighting, palette, style and literal
text; the reasoning trace in words; and the enhanced prompt. The form follows the dimensions that HunyuanImage-3.0
reasons through (subject, composition, environment, lighting, palette, style, details); English and Chinese.

One record is one JSON file beside its picture: `cat.png` has `cat.thinking.json`, as it has `cat.txt`. Records are made by
`data_tools.thinking_rules` (offline), by captioners, and by the enhancers of `finetune.thinking`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.atomic_files import write_text
from data_tools.errors import DataError
from data_tools.near_names import meant_path
from data_tools.thinking_schema import RECORD_SCHEMA, RECORD_VERSION, schema_problems

SUFFIX = ".thinking.json"
LARGEST_FILE_BYTES = 2_000_000
# Tags of the reply format, and control characters, never belong into a value: they would break what is built from it.
FORBIDDEN = re.compile(r"</?\s*(?:think|recaption|answer)\s*>|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", re.IGNORECASE)
SURROGATE = re.compile("[\ud800-\udfff]")
# Relations that cannot hold both ways, as (direction, whether the pair is turned round).
DIRECTIONS = {
    "on": ("up", False), "above": ("up", False), "under": ("up", True), "below": ("up", True), "left_of": ("left", False),
    "right_of": ("left", True), "in_front_of": ("front", False), "behind": ("front", True), "inside": ("inside", False),
}


@dataclass(frozen=True)
class Element:
    """One kind of thing in the picture. id: unique in its record ("e1").  count: how many, at least 1."""

    id: str
    name: str
    count: int = 1
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Relation:
    """Element `a` stands in `relation` (of `thinking_schema.RELATIONS`) to element `b`; both are ids."""

    a: str
    relation: str
    b: str


@dataclass(frozen=True)
class ThinkingRecord:
    """A prompt or picture, thought through.

    prompt: the words it began with.  language: "en" or "zh".  enhanced: the prompt to draw with; equal to `prompt`
    where `ok` is false, and `reason` then says why.  palette: colour words or "#rrggbb".  text: literal text, without
    quotes.  trace: the reasoning in words.  backend, model, seed: who made it.  raw: a model's own words, if any.
    """

    prompt: str
    language: str = "en"
    elements: tuple[Element, ...] = ()
    relations: tuple[Relation, ...] = ()
    composition: str = ""
    environment: str = ""
    lighting: str = ""
    palette: tuple[str, ...] = ()
    style: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    trigger: str | None = None
    trace: str = ""
    enhanced: str = ""
    backend: str = "rules"
    model: str | None = None
    seed: int = 0
    ok: bool = True
    reason: str = ""
    raw: str = ""

    @property
    def total_count(self) -> int:
        """How many things are asked for, counts included."""
        return sum(element.count for element in self.elements)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, `v` first."""
        return {"v": RECORD_VERSION} | json.loads(json.dumps(asdict(self)))

    def given_up(self, reason: str) -> ThinkingRecord:
        """The same record, not to be used: the original prompt stands, and the reason is kept."""
        return replace(self, enhanced=self.prompt, ok=False, reason=reason[:2000])


def _relation_problems(data: Mapping[str, Any]) -> Iterator[str]:
    ids = [element["id"] for element in data["elements"]]
    if len(set(ids)) < len(ids):
        yield "two elements have the same id"
    directed = set()
    for relation in data["relations"]:
        a, b = relation["a"], relation["b"]
        for end in (a, b):
            if end not in ids:
                yield f"a relation names {end!r}, which is not the id of an element"
        if a == b:
            yield f"the element {a!r} is in relation to itself"
        if relation["relation"] in DIRECTIONS:
            direction, turned = DIRECTIONS[relation["relation"]]
            directed.add((b, direction, a) if turned else (a, direction, b))
    for a, direction, b in sorted(directed):
        if a < b and (b, direction, a) in directed:
            yield f"the relations between {a!r} and {b!r} contradict each other"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _strings(entry)


def record_problems(data: Any) -> list[str]:
    """Everything that is wrong with JSON data that claims to be a thinking record; empty when it is one."""
    problems = list(schema_problems(data, RECORD_SCHEMA))
    if problems:
        return problems
    problems += _relation_problems(data)
    # A reason may name the tag that was out of place.
    checked = {key: value for key, value in data.items() if key not in ("raw", "prompt", "enhanced", "reason")}
    if data["enhanced"] != data["prompt"]:
        checked["enhanced"] = data["enhanced"]
    if any(SURROGATE.search(text) for text in _strings(data)):
        problems.append("a value holds half of a character (a lone surrogate)")
    if any(FORBIDDEN.search(text) for text in _strings(checked)):
        problems.append("a value holds a reply tag or a control character")
    if data["ok"] and not data["enhanced"].strip():
        problems.append("the enhanced prompt is empty")
    return problems


def from_json(data: Any, *, where: str | None = None) -> ThinkingRecord:
    """A checked record. Raises DataError that names every problem."""
    problems = record_problems(data)
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise DataError("not a thinking record: " + "; ".join(problems[:4]) + more, where=where,
                        fix="make the record again, or delete the file")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key != "v"}
    values["elements"] = tuple(Element(**{**entry, "attributes": tuple(entry.get("attributes", ()))}) for entry in data["elements"])
    values["relations"] = tuple(Relation(**entry) for entry in data["relations"])
    return ThinkingRecord(**values)


def thinking_path(picture: Path | str) -> Path:
    """Where the record of a picture lies: `cat.thinking.json` for `cat.png`, as its other sidecars do."""
    picture = Path(picture)
    return picture.with_name(picture.stem + SUFFIX)


def write_record(path: Path | str, record: ThinkingRecord) -> None:
    """Write the record as JSON, whole or not at all. Raises DataError when it is not a valid record."""
    data = record.to_json()
    from_json(data, where=str(path))
    write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def read_record(path: Path | str) -> ThinkingRecord:
    """Read and check one record. Raises DataError for a missing, oversized, broken or invalid file."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise DataError(f"larger than {LARGEST_FILE_BYTES} bytes", where=str(path), fix="this is not a thinking record")
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError((error.strerror or "cannot be read").lower(), where=str(path), fix=meant_path(path, "a record lies beside its picture: cat.png has cat.thinking.json")) from None
    except (ValueError, RecursionError):
        raise DataError("not JSON in UTF-8", where=str(path), fix="make the record again, or delete the file") from None
    return from_json(data, where=str(path))


def caption_to_train(text: str) -> str | None:
    """The caption that a stored record (its JSON text) stands for in training: the enhanced prompt, which is the form
    that prompts have in use with `--think`. None for a record that gave up, and for text that is no record."""
    try:
        record = from_json(json.loads(text))
    except (ValueError, RecursionError, DataError):
        return None
    return record.enhanced if record.ok else None
