"""Errors of training and adapters. Each says what is wrong, where, and what to do; each knows its exit code."""

from __future__ import annotations

from data_tools.errors import BadInput, BrushworkError, DataError

__all__ = [
    "AdapterError", "BadInput", "BaseModelError", "BrushworkError", "DataError", "Interrupted", "RecipeError",
    "RunFolderError", "TrainingError", "VerifyError",
]


class RecipeError(BadInput):
    """A recipe has mistakes; `problems` holds all of them, each with its own place and hint."""

    def __init__(self, problems: list[BrushworkError]):
        self.problems = problems
        count = f"{len(problems)} mistake{'s' if len(problems) != 1 else ''} in the recipe"
        super().__init__(count, where=problems[0].where if len(problems) == 1 else None)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class BaseModelError(BadInput):
    """The base model is unknown, incomplete, or of another kind than asked for."""


class AdapterError(BadInput):
    """An adapter file is not readable, not a LoRA, or does not fit the model."""


class RunFolderError(BadInput):
    """The run folder is in use, holds another run, or cannot be resumed."""


class VerifyError(BrushworkError):
    """An adapter was loaded back and did not prove itself."""


class TrainingError(BrushworkError):
    """Training stopped: numbers blew up, memory or disk ran out."""


class Interrupted(BrushworkError):
    """Stopped by the user; the run is saved. 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, exit_code: int = 130):
        super().__init__(what, where=where, fix=fix)
        self.exit_code = exit_code
