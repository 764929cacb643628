"""Append-only JSON Lines that lose nothing: one record a line, flushed to disk before `append` returns.

Several processes may append to one journal (a lock around each write). What a power cut leaves is at most one torn last
line; it is put aside, never guessed at, and everything before it stands.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from data_tools.atomic_files import FILE_MODE, flush_folder
from data_tools.errors import DataError

LONGEST_LINE = 1 << 20


def parse_line(text: str, where: str) -> dict[str, Any]:
    """One JSON object. Raises DataError for anything else (bad syntax, NaN, nesting too deep, not an object)."""
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON object ({str(error)[:120]})", where=where, fix="every line is one JSON object; delete or mend this line") from None
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__} where a JSON object is expected", where=where, fix="every line is one JSON object")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class Journal:
    """The lines of one file. `read_new` gives each complete record once, so a reader keeps up with other writers."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.torn = False
        self._offset = 0
        self._line = 0

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and wait until it is on disk. Raises OSError of the write itself (disk full, read-only)."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        is_new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._mend_tail(descriptor)
            self._write_whole(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            flush_folder(self.path.parent)

    @staticmethod
    def _write_whole(descriptor: int, line: bytes) -> None:
        """Write everything or leave the file as it was: a full disk must not leave half a line."""
        size = os.fstat(descriptor).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError:
            os.ftruncate(descriptor, size)
            raise

    def _mend_tail(self, descriptor: int) -> None:
        """End an unfinished last line: complete JSON gets its newline, a torn piece goes to `<name>.torn`."""
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return
        start, tail = _last_line(descriptor, size)
        if _is_record(tail):
            os.write(descriptor, b"\n")
            return
        with open(self.path.with_name(self.path.name + ".torn"), "ab") as aside:
            aside.write(tail + b"\n")
            os.fsync(aside.fileno())
        os.ftruncate(descriptor, start)

    def read_new(self) -> list[tuple[str, dict[str, Any]]]:
        """(place, record) of every complete line added since the last call. Raises DataError naming the line."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as source:
            source.seek(self._offset)
            content = source.read()
        lines = content.split(b"\n")
        tail = lines.pop()
        self.torn = bool(tail) and not _is_record(tail)
        if tail and not self.torn:
            lines.append(tail)
        records = []
        for number, raw in enumerate(lines, self._line + 1):
            if raw.strip():
                records.append((f"{self.path.name}, line {number}", self._decode(raw, number)))
        self._line += content.count(b"\n")
        self._offset += len(content) - (len(tail) if self.torn else 0)
        return records

    def _decode(self, raw: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path.name}, line {number}"
        if len(raw) > LONGEST_LINE:
            raise DataError(f"line of {len(raw):,} bytes; the limit is {LONGEST_LINE:,}", where=where)
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError("not UTF-8 text", where=where, fix="save the file as UTF-8") from None
        return parse_line(text, where)


def _last_line(descriptor: int, size: int) -> tuple[int, bytes]:
    """(offset, bytes) of what follows the last newline."""
    start = max(0, size - LONGEST_LINE)
    content = os.pread(descriptor, size - start, start)
    cut = content.rfind(b"\n") + 1
    return start + cut, content[cut:]


def _is_record(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False
