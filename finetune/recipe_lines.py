"""In which line of a TOML text a key is set. Works on text that `tomllib` has accepted."""

from __future__ import annotations

import bisect
import re
import tomllib

Key = tuple[str, ...]
_KEY_PART = r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|[A-Za-z0-9_-]+)"""
_KEY = rf"{_KEY_PART}(?:\s*\.\s*{_KEY_PART})*"
_HEADER = re.compile(rf"\s*\[\[?\s*({_KEY})\s*\]\]?")
_ASSIGNMENT = re.compile(rf"\s*({_KEY})\s*=")
_TOKEN = re.compile(r'"""|\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|[\[\]{}#\n]')


def key_lines(text: str) -> dict[Key, int]:
    """Every key that has a line of its own, as a tuple of its parts, with its line number (from 1).

    A table of a list of tables is found under its number (from 0) too: ("data", "also", "1", "folder").
    """
    newlines = [place for place, character in enumerate(text) if character == "\n"]
    lines: dict[Key, int] = {}
    table: Key = ()
    counted: dict[Key, int] = {}
    position = 0
    while position < len(text):
        if header := _HEADER.match(text, position):
            table, line = _parts(header[1]), bisect.bisect_left(newlines, header.start(1)) + 1
            lines.setdefault(table, line)
            if header[0].lstrip().startswith("[["):
                counted[table] = counted.get(table, -1) + 1
                table = (*table, str(counted[table]))
                lines[table] = line
            position = _end_of_line(text, header.end())
        elif assignment := _ASSIGNMENT.match(text, position):
            lines.setdefault(table + _parts(assignment[1]), bisect.bisect_left(newlines, assignment.start(1)) + 1)
            position = _end_of_value(text, assignment.end())
        else:
            position = _end_of_line(text, position)
    return lines


def line_of(lines: dict[Key, int], key: Key) -> int | None:
    """The line of `key`, or of the nearest table around it; None when nothing of it is written."""
    for length in range(len(key), 0, -1):
        if key[:length] in lines:
            return lines[key[:length]]
    return None


def _parts(key: str) -> Key:
    """The parts of a dotted key, quotes removed."""
    nested = tomllib.loads(f"{key} = 0")
    parts = []
    while isinstance(nested, dict):
        (name, nested), = nested.items()
        parts.append(name)
    return tuple(parts)


def _end_of_line(text: str, position: int) -> int:
    newline = text.find("\n", position)
    return len(text) if newline < 0 else newline + 1


def _end_of_value(text: str, position: int) -> int:
    """Where the line after a value begins; the value may span lines in arrays and triple-quoted text."""
    depth = 0
    while token := _TOKEN.search(text, position):
        mark, position = token[0], token.end()
        if mark in ('"""', "'''"):
            position = _end_of_multiline(text, mark, position)
        elif mark == "#":
            position = text.find("\n", position)
            if position < 0:
                return len(text)
        elif mark in "[{":
            depth += 1
        elif mark in "]}":
            depth -= 1
        elif mark == "\n" and depth <= 0:
            return position
    return len(text)


def _end_of_multiline(text: str, mark: str, position: int) -> int:
    closing = re.compile(r'(?:\\.|[^\\])*?"""' if mark == '"""' else r".*?'''", re.DOTALL)
    found = closing.match(text, position)
    return found.end() if found else len(text)
