"""Reading a recipe file: size, encoding, TOML syntax, and where each key stands."""

from __future__ import annotations

import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import BrushworkError
from data_tools.near_names import meant_path
from finetune.errors import RecipeError
from finetune.recipe_lines import Key, key_lines, line_of

MOST_BYTES = 256 * 1024
MOST_NESTING = 64
_PLACE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")
_YAML_LINE = re.compile(r"^\s*(- )?[A-Za-z_]\w*:(\s|$)")


@dataclass(frozen=True)
class RecipeText:
    """Parsed TOML and the line of every key. `name` is how the file is called in messages, "" for a mapping."""

    content: Mapping[str, Any]
    name: str = ""
    lines: Mapping[Key, int] = field(default_factory=dict)

    @staticmethod
    def of_mapping(content: Mapping[str, Any]) -> RecipeText:
        """Settings that come from a program, not from a file."""
        return RecipeText(content)

    def place(self, key: Key) -> str:
        """File, line and key, as far as there are any."""
        parts = [self.name] if self.name else []
        line = line_of(dict(self.lines), key)
        if line:
            parts.append(f"line {line}")
        parts.append(".".join(key)[:120])
        return ", ".join(parts)


def read_recipe_text(path: Path) -> RecipeText:
    """Parse a recipe file. Raises RecipeError for one that is absent, too large, not UTF-8 or not TOML."""
    name = str(path)
    text = _decode(_read(path), name)
    _refuse_deep_nesting(text, name)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _one(*_syntax_problem(str(error), text, name)) from None
    except (RecursionError, ValueError) as error:
        # int() of more than 4,300 digits, and a stack that is too small for what passed the nesting limit
        raise _one(f"not readable as TOML: {str(error)[:120]}", name, "check the values for numbers that are far too long") from None
    return RecipeText(content, name, key_lines(text))


def _one(what: str, where: str, fix: str) -> RecipeError:
    return RecipeError([BrushworkError(what, where=where, fix=fix)])


def _read(path: Path) -> bytes:
    name = str(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise _one("this is a folder, not a recipe", name, "give a .toml file; a folder of pictures goes to `brushwork train FOLDER`")
        if not stat.S_ISREG(status.st_mode):
            raise _one("this is not a regular file", name, "give a .toml file")
        if status.st_size > MOST_BYTES:
            raise _one(f"the file has {status.st_size:,} bytes, a recipe at most {MOST_BYTES:,}", name, "is this another kind of file?")
        return path.read_bytes()
    except FileNotFoundError:
        raise _one("there is no such recipe", name, meant_path(path, "`brushwork recipe list` shows those that come with the program")) from None
    except (OSError, ValueError) as error:
        raise _one(f"the file cannot be read: {getattr(error, 'strerror', None) or error}", name, "check its name and permissions") from None


def _decode(content: bytes, name: str) -> str:
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise _one("the file starts with a byte order mark", f"{name}, line 1", "save it as UTF-8 without BOM")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _one("this line is not UTF-8 text", f"{name}, line {line}", "save the file as UTF-8") from None


def _refuse_deep_nesting(text: str, name: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        dots = line.partition("=")[0].count(".")
        if dots > MOST_NESTING or line.count("[") > MOST_NESTING or line.count("{") > MOST_NESTING:
            raise _one("nested too deeply", f"{name}, line {number}", "a recipe has sections with settings, and nothing deeper")
    if text.count("[") + text.count("{") > 4 * MOST_NESTING:
        raise _one("far more brackets than a recipe has", name, "a recipe has sections with settings, and nothing deeper")


def _syntax_problem(message: str, text: str, name: str) -> tuple[str, str, str]:
    """(what, where, fix) for a TOML syntax error."""
    lines = text.splitlines()
    found = _PLACE.search(message)
    number = int(found[1]) if found and found[1] else max(len(lines), 1)
    line = lines[number - 1] if number <= len(lines) else ""
    key = line.partition("=")[0].strip()[:60]
    what = _PLACE.sub("", message)[:160]
    what = what[:1].lower() + what[1:]
    where = f"{name}, line {number}" + (f", {key}" if key else "")
    if text.lstrip().startswith("{"):
        return what, where, "this looks like JSON; recipes are TOML: [section] lines and `key = value`"
    if sum(bool(_YAML_LINE.match(each)) for each in lines) > len(lines) / 3:
        return what, where, "this looks like YAML; recipes are TOML: [section] lines and `key = value`"
    if "overwrite" in message or "twice" in message or "already" in message:
        return f"`{key}` is set twice: {what}", where, "keep one of the two"
    value = line.partition("=")[2].strip()
    if re.match(r"[A-Za-z_./~]", value) and value not in ("true", "false", "inf", "nan"):
        return what, where, f'text needs quotes: {key} = "{value[:40]}"'
    return what, where, "recipes are TOML: text in quotes, true and false in lower case, one setting a line"
