"""From what was typed after `train` or `plan` to a checked recipe and the run's folder."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.errors import BadInput, DataError
from data_tools.near_names import meant_path

if TYPE_CHECKING:
    from finetune.recipe import Recipe

Target = Annotated[str, typer.Argument(metavar="FOLDER|RECIPE", help="A folder of pictures, a .toml recipe, a name from `recipe list`, or a run folder.")]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="`mini`, a folder in diffusers layout, or a Hub id.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="The recipe for a folder of pictures.")]
Trigger = Annotated[str | None, typer.Option("--trigger", metavar="WORDS", help="Words that call the style in a prompt.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; can be given several times.")]

RUNS = Path("runs")


@dataclass(frozen=True)
class Wanted:
    """A checked recipe; `notes` says which recipe was taken without being asked for; `run` is set when a run was named."""

    recipe: Recipe
    notes: tuple[str, ...] = ()
    run: Path | None = None


def wanted_recipe(target: str, base: str | None, recipe: str | None, trigger: str | None, changes: Sequence[str] | None, *, needs_pictures: bool = True) -> Wanted:
    """The recipe that the command line asks for. Raises RecipeError, or BadInput when pictures or base are not named.

    needs_pictures: False takes a recipe that names no folder of pictures; a folder that is named must be there all the same."""
    from finetune.recipe import load_recipe
    from finetune.recipe_shelf import find_recipe

    overrides = [f"{key}={json.dumps(value)}" for key, value in (("base.model", base), ("data.trigger", trigger)) if value is not None]
    overrides += changes or []
    folder = Path(target).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    if folder.is_dir() and (folder / "recipe.toml").is_file():
        return Wanted(load_recipe(folder / "recipe.toml", overrides, of_run=True), run=folder)
    if folder.is_dir() and os.listdir(folder) == ["lock"]:
        raise BadInput("a run was stopped here before it began, and nothing of it is kept", where=target, fix=f"start it again as it was started, with --out {target}")
    if not folder.is_dir():
        if recipe is not None:
            raise DataError("there is no such folder of pictures", where=target, fix=meant_path(target, "with --recipe, give the folder that the pictures are in"))
        loaded = _loaded(_recipe_file(target), overrides)
        return replace(loaded, recipe=_with_pictures(loaded.recipe, target)) if needs_pictures or loaded.recipe.data.folder else loaded
    overrides.insert(0, f"data.folder={json.dumps(str(folder))}")
    if recipe is not None:
        return _loaded(find_recipe(recipe), overrides)
    return _recipe_for_base(base, overrides)


def _loaded(path: Path, overrides: Sequence[str]) -> Wanted:
    """A recipe file under the overrides; of a shipped recipe that is given few steps, with a warm-up that fits into them."""
    from finetune.recipe import load_recipe
    from finetune.recipe_shelf import fitting

    changes = fitting(path, overrides)
    return Wanted(load_recipe(path, changes), tuple(f"{change}: the recipe's own is longer than the whole training" for change in changes[len(overrides):]))


def _check_folder(folder: Path) -> None:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError("the folder may not be read", where=str(folder), fix="check its permissions")
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise DataError("the folder's name is not UTF-8, and a recipe is", where=str(folder), fix="rename the folder") from None


def _is_set_in_a_file(path: Path) -> bool:
    """Whether `brushwork data` reads such a file as a set of pictures or captions, which a run does not."""
    from data_tools.layouts.detect import BY_SUFFIX

    return path.suffix.lower() in BY_SUFFIX


def _recipe_file(target: str) -> Path:
    """The recipe that `target` names; anything else is a folder that is not there."""
    from data_tools.near_names import nearest
    from finetune.recipe_shelf import find_recipe, shelf

    if Path(target).is_file() and not target.endswith(".toml") and _is_set_in_a_file(Path(target)):
        raise DataError("this is a file of pictures or captions, and training takes a folder", where=target,
                        fix=f"`brushwork data convert {target} --to sidecars --out FOLDER` makes one of it")
    names = [recipe.name for recipe in shelf()]
    if target.endswith(".toml") or Path(target).exists() or target in names:
        return find_recipe(target)
    near = nearest(target, names)
    raise DataError("there is neither a folder nor a recipe of this name", where=target,
                    fix=f"did you mean the recipe `{near}`?" if near else meant_path(target, "give a folder of pictures, or a recipe (`brushwork recipe list`)"))


def _recipe_for_base(base: str | None, overrides: list[str]) -> Wanted:
    """Without a recipe: the one that was made for this base, else the defaults."""
    from finetune.recipe import load_recipe
    from finetune.recipe_shelf import recipes_for_base

    named = base or next((change.partition("=")[2] for change in overrides if change.startswith("base.model=")), None)
    if named is None:
        raise BadInput("the base model is not named", where="--base", fix="add --base mini, --base FOLDER, --base OWNER/NAME, or --recipe NAME")
    made_for_it = recipes_for_base(named)
    if len(made_for_it) == 1:
        only = made_for_it[0]
        loaded = _loaded(only.path, overrides)
        return replace(loaded, notes=(f"recipe {only.name}: the one made for this base", *loaded.notes))
    notes = (f"default settings; recipes made for this base: {', '.join(each.name for each in made_for_it)} (choose with --recipe)",) if made_for_it else ()
    return Wanted(load_recipe({"base": {"model": named}}, overrides), notes)


def _with_pictures(recipe: Recipe, target: str) -> Recipe:
    folder = recipe.data.folder
    if folder is None:
        raise BadInput("the recipe does not name a folder of pictures", where=target, fix=f"brushwork train PICTURES --recipe {target}, or add --set data.folder=PICTURES")
    if not folder.is_dir():
        raise DataError("the recipe's folder of pictures does not exist", where=str(folder), fix=meant_path(folder, "change data.folder in the recipe, or add --set data.folder=PICTURES"))
    return recipe


def run_folder(wanted: Wanted, out: Path | None, resume: bool) -> Path:
    """Where the run lives: --out, the run that was named, or a new folder under runs/ called after the pictures."""
    if out is not None:
        return out
    if wanted.run is not None:
        if not resume:
            raise BadInput("this is a run already", where=str(wanted.run), fix="go on with --resume, or start a new one with --out FOLDER")
        return wanted.run
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("several processes need one run folder", where="--out", fix="add --out FOLDER")
    name = wanted.recipe.data.folder.resolve().name if wanted.recipe.data.folder else "run"
    return last_run_folder(name) if resume else free_run_folder(name)


def _run_names(name: str) -> Iterator[str]:
    return itertools.chain([name or "run"], (f"{name or 'run'}-{number}" for number in itertools.count(2)))


def free_run_folder(name: str) -> Path:
    """runs/NAME, or the first runs/NAME-2, runs/NAME-3 ... that is not there yet."""
    return next(RUNS / each for each in _run_names(name) if not (RUNS / each).exists())


def last_run_folder(name: str) -> Path:
    """The newest run of this name. Raises BadInput when there is none."""
    started = list(itertools.takewhile(lambda each: (RUNS / each).exists(), _run_names(name)))
    runs = [each for each in started if (RUNS / each / "recipe.toml").is_file()]
    if not runs:
        raise BadInput("there is no run to go on with", where=str(RUNS / (name or "run")), fix="name it with --out FOLDER, or start without --resume")
    return RUNS / runs[-1]
