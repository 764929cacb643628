"""The base of every error that a user sees: what is wrong, where, and what to do about it."""

from __future__ import annotations


class BrushworkError(Exception):
    """An expected failure. The command prints it as one clear line and exits with `exit_code`.

    what: the fact, without a full stop.  where: file, line, key or picture.  fix: what the user can do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        hint = f"\nhint: {self.fix}" if self.fix else ""
        return f"{place}{self.what}{hint}"


class BadInput(BrushworkError):
    """The command line, a recipe, a picture folder or a file that was handed in is not usable."""

    exit_code = 2


class DataError(BadInput):
    """A picture folder, caption file or dataset description is not usable."""
