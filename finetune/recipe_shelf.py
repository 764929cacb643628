"""The recipes that come with the program: find them by name, and read the header in which each says what it needs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import BrushworkError, RecipeError
from data_tools.near_names import nearest

HEADER_NAMES = ("needs", "command", "expect")


@dataclass(frozen=True)
class ShelfRecipe:
    """A shipped recipe. `name` is "family/purpose"; `header` has its needs, command and expect lines."""

    name: str
    path: Path
    summary: str
    header: dict[str, str]


def shelf_folder() -> Path:
    """`recipes/` of the checkout, or its copy inside the installed package."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shelf() -> list[ShelfRecipe]:
    """Every shipped recipe, by name."""
    folder = shelf_folder()
    return [_read(path, path.relative_to(folder).with_suffix("").as_posix()) for path in sorted(folder.rglob("*.toml"))]


def find_recipe(given: str) -> Path:
    """The file of a recipe that was named on the command line: a path, or a name from the shelf."""
    path = Path(given)
    if path.suffix == ".toml" or path.exists():
        return path
    shipped = {recipe.name: recipe.path for recipe in shelf()}
    if given in shipped:
        return shipped[given]
    near = nearest(given, shipped)
    fix = f"did you mean `{near}`?" if near else "`brushwork recipe list` shows those that come with the program; another one is given as a .toml file"
    raise RecipeError([BrushworkError("there is no such recipe", where=given, fix=fix)])


def recipes_for_base(model: str) -> list[ShelfRecipe]:
    """The shipped recipes whose base is `model`."""
    return [recipe for recipe in shelf() if tomllib.loads(recipe.path.read_text(encoding="utf-8"))["base"]["model"] == model]


def fitting(path: Path, overrides: Sequence[str]) -> list[str]:
    """`overrides`, and with them a shorter warm-up for a shipped recipe that is given fewer steps than its own warm-up has.

    Whoever takes a shipped recipe has not chosen its warm-up. One that somebody wrote, in a recipe or an override, is never changed.
    """
    if not path.resolve().is_relative_to(shelf_folder().resolve()):
        return list(overrides)
    given = {key.strip(): value.strip() for key, _, value in (override.partition("=") for override in overrides)}
    own = tomllib.loads(path.read_text(encoding="utf-8")).get("training", {}).get("warmup", 0)
    steps = given.get("training.steps", "")
    if "training.warmup" in given or not re.fullmatch(r"[1-9]\d{0,7}", steps) or own <= int(steps):
        return list(overrides)
    return [*overrides, f"training.warmup={steps}"]


def _read(path: Path, name: str) -> ShelfRecipe:
    """The header is the comment at the top: a sentence, then `needs:`, `command:` and `expect:` lines."""
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("# ").rstrip())
    header = {}
    for line in comments[1:]:
        key, colon, text = line.partition(":")
        if colon and key in HEADER_NAMES:
            header[key] = text.strip()
    return ShelfRecipe(name, path, comments[0] if comments else "", header)
