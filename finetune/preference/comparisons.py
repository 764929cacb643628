"""What people said about pictures, in one open JSONL form: judgements, skips and undos, one event a line.

An event is appended and flushed to disk before anything else happens, and never edited: undoing is a new event, and the
present state is the replay of all of them. The form is described field by field at `Judgement`.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import DataError

from finetune.preference.journal import Journal

MODES = ("pair", "rank", "score")
CRITERIA = ("alignment", "aesthetics", "realism", "style")


@dataclass(frozen=True)
class Judgement:
    """One answer of one annotator; the keys of a line are the names here, with `"v": 1, "event": "judgement"`.

    items: candidate ids in stored order; shown: the same ids in the order of the screen (left to right).
    mode pair: `choice` is the preferred id, or None with `tie` (equally good) or `both_bad` (equally bad; implies tie).
    mode rank: `ranking` gives each item's rank in the order of `items`, 1 is best, equal numbers are ties.
    mode score: one item, `axes` gives whole points 1..5 per criterion.
    ms: milliseconds from showing to answering.  ts: UTC, ISO 8601.  repeat: asked again to measure consistency.
    """

    rater: str
    mode: str
    prompt_id: str
    prompt: str
    items: tuple[str, ...]
    shown: tuple[str, ...] = ()
    choice: str | None = None
    tie: bool = False
    both_bad: bool = False
    ranking: tuple[int, ...] | None = None
    axes: Mapping[str, int] | None = None
    ms: int | None = None
    ts: str | None = None
    repeat: bool = False
    id: str = ""

    def to_record(self) -> dict[str, Any]:
        """The line's object, keys in the documented order."""
        return {
            "v": 1, "event": "judgement", "id": self.id or new_id(), "rater": self.rater, "mode": self.mode, "prompt_id": self.prompt_id,
            "prompt": self.prompt, "items": list(self.items), "shown": list(self.shown or self.items), "choice": self.choice, "tie": self.tie,
            "both_bad": self.both_bad, "ranking": list(self.ranking) if self.ranking else None, "axes": dict(self.axes) if self.axes else None,
            "ms": self.ms, "ts": self.ts or now(), "repeat": self.repeat,
        }


@dataclass(frozen=True)
class Skip:
    """An annotator passed over these items."""

    rater: str
    mode: str
    items: tuple[str, ...]
    id: str = ""
    repeat: bool = False

    def to_record(self) -> dict[str, Any]:
        return {"v": 1, "event": "skip", "id": self.id or new_id(), "rater": self.rater, "mode": self.mode, "items": list(self.items), "ts": now(), "repeat": self.repeat}


@dataclass(frozen=True)
class Undo:
    """Takes back the event with the id `undoes`."""

    rater: str
    undoes: str
    id: str = ""

    def to_record(self) -> dict[str, Any]:
        return {"v": 1, "event": "undo", "id": self.id or new_id(), "rater": self.rater, "undoes": self.undoes, "ts": now()}


Event = Judgement | Skip | Undo


def new_id() -> str:
    """A fresh event id."""
    return uuid.uuid4().hex


def now() -> str:
    """The present as UTC, ISO 8601 with seconds."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ComparisonLog:
    """The events of one `comparisons.jsonl`; keeps up with other processes that append to it."""

    def __init__(self, path: Path | str):
        self.journal = Journal(path)
        self._events: dict[str, Event] = {}
        self._undone: set[str] = set()

    def refresh(self) -> ComparisonLog:
        """Read what was appended since. Raises DataError naming line and mistake."""
        for where, record in self.journal.read_new():
            event = event_from_record(record, where)
            if event.id in self._events:
                raise DataError(f"the id {event.id!r} was used before", where=where, fix="every event has an id of its own")
            self._remember(event)
        return self

    def append(self, event: Event) -> Event:
        """Write one event to disk, then count it. An id that is known already is not written twice."""
        self.refresh()
        record = event.to_record()
        if record["id"] not in self._events:
            event_from_record(record, "new event")
            self.journal.append(record)
            self.refresh()
        return self._events[record["id"]]

    def _remember(self, event: Event) -> None:
        self._events[event.id] = event
        if isinstance(event, Undo):
            self._undone.add(event.undoes)

    def knows(self, event_id: str) -> bool:
        """Whether an event with this id is on disk."""
        return event_id in self._events

    def standing(self, rater: str | None = None) -> list[Event]:
        """Judgements and skips that were not undone, oldest first; of one rater or of all."""
        return [
            event for event in self._events.values()
            if not isinstance(event, Undo) and event.id not in self._undone and (rater is None or event.rater == rater)
        ]

    def judgements(self) -> list[Judgement]:
        """Judgements that were not undone, oldest first."""
        return [event for event in self.standing() if isinstance(event, Judgement)]


def event_from_record(record: Mapping[str, Any], where: str) -> Event:
    """Check one line's object and name its event. Keys that this version does not know are left alone."""
    if record.get("v") != 1 or isinstance(record.get("v"), bool):
        raise DataError(f"form version {record.get('v')!r}; this program reads version 1", where=where, fix='every line has "v": 1')
    readers = {"judgement": _judgement, "skip": _skip, "undo": _undo}
    kind = record.get("event")
    if not isinstance(kind, str) or kind not in readers:
        raise DataError(f"event {kind!r} is not one of judgement, skip, undo", where=where)
    return readers[kind](record, where)


def _text(record: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not (value or empty):
        raise DataError(f"`{key}` is {value!r}; it must be text", where=where)
    return value


def _ids(record: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise DataError(f"`{key}` must be a list of candidate ids", where=where)
    if len(set(value)) != len(value):
        raise DataError(f"`{key}` names a candidate twice", where=where)
    return tuple(value)


def _flag(record: Mapping[str, Any], key: str, where: str) -> bool:
    value = record.get(key)
    if value not in (None, True, False) or isinstance(value, int) and not isinstance(value, bool):
        raise DataError(f"`{key}` is {value!r}; it must be true or false", where=where)
    return bool(value)


def _mode(record: Mapping[str, Any], where: str) -> str:
    mode = record.get("mode")
    if mode not in MODES:
        raise DataError(f"mode {mode!r} is not one of {', '.join(MODES)}", where=where)
    return mode


def _judgement(record: Mapping[str, Any], where: str) -> Judgement:
    mode, items = _mode(record, where), _ids(record, "items", where)
    shown = _ids(record, "shown", where) if record.get("shown") is not None else items
    if set(shown) != set(items):
        raise DataError("`shown` does not name the same candidates as `items`", where=where)
    milliseconds = record.get("ms")
    if milliseconds is not None and (not isinstance(milliseconds, int) or isinstance(milliseconds, bool) or milliseconds < 0):
        raise DataError(f"`ms` is {milliseconds!r}; it must be milliseconds, 0 or more", where=where)
    both_bad = _flag(record, "both_bad", where)
    judgement = Judgement(
        id=_text(record, "id", where), rater=_text(record, "rater", where), mode=mode, prompt_id=_text(record, "prompt_id", where),
        prompt=_text(record, "prompt", where, empty=True), items=items, shown=shown, choice=record.get("choice"),
        tie=_flag(record, "tie", where) or both_bad, both_bad=both_bad, ranking=_ranking(record, items, where), axes=_axes(record, where),
        ms=milliseconds, ts=record.get("ts"), repeat=_flag(record, "repeat", where),
    )
    ANSWER_CHECKS[mode](judgement, where)
    return judgement


def _ranking(record: Mapping[str, Any], items: tuple[str, ...], where: str) -> tuple[int, ...] | None:
    value = record.get("ranking")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != len(items) or not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in value):
        raise DataError(f"`ranking` must give each of the {len(items)} items a rank, 1 is best", where=where)
    return tuple(value)


def _axes(record: Mapping[str, Any], where: str) -> dict[str, int] | None:
    value = record.get("axes")
    if value is None:
        return None
    valid = isinstance(value, dict) and value and all(isinstance(points, int) and not isinstance(points, bool) and 1 <= points <= 5 for points in value.values())
    if not valid:
        raise DataError("`axes` must give whole points from 1 to 5 by criterion", where=where)
    return dict(value)


def _check_pair(judgement: Judgement, where: str) -> None:
    if len(judgement.items) != 2:
        raise DataError(f"a pair of {len(judgement.items)} items", where=where)
    if judgement.tie == (judgement.choice is not None):
        raise DataError("a pair needs either a `choice` or `tie`", where=where)
    if judgement.choice is not None and judgement.choice not in judgement.items:
        raise DataError(f"`choice` {judgement.choice!r} is not one of the items", where=where)


def _check_rank(judgement: Judgement, where: str) -> None:
    if len(judgement.items) < 2 or (judgement.ranking is None and not judgement.both_bad):
        raise DataError("a ranking needs two or more items and `ranking`", where=where)


def _check_score(judgement: Judgement, where: str) -> None:
    if len(judgement.items) != 1 or judgement.axes is None:
        raise DataError("a score needs exactly one item and `axes`", where=where)


ANSWER_CHECKS = {"pair": _check_pair, "rank": _check_rank, "score": _check_score}


def _skip(record: Mapping[str, Any], where: str) -> Skip:
    return Skip(id=_text(record, "id", where), rater=_text(record, "rater", where), mode=_mode(record, where), items=_ids(record, "items", where), repeat=_flag(record, "repeat", where))


def _undo(record: Mapping[str, Any], where: str) -> Undo:
    return Undo(id=_text(record, "id", where), rater=_text(record, "rater", where), undoes=_text(record, "undoes", where))
