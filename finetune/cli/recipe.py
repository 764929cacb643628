"""`brushwork recipe list|show|check|explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.cli.output import Json, Quiet, command_group, emit

Override = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; can be given several times.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = command_group("Recipes: every decision of a run in one file.")
    group.command("list")(list_recipes)
    group.command("show")(show)
    group.command("check")(check)
    group.command("explain")(explain)
    app.add_typer(group, name="recipe")


def list_recipes(json: Json = False, quiet: Quiet = False) -> None:
    """The recipes that come with the program."""
    from finetune.recipe_shelf import shelf

    recipes = shelf()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    data = {"recipes": [{"name": recipe.name, "path": recipe.path, "summary": recipe.summary, **recipe.header} for recipe in recipes]}
    emit(data, [f"{recipe.name:{width}}  {recipe.summary}" for recipe in recipes], json=json)


def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file, or a name from `recipe list`.")],
    changes: Override = None, json: Json = False, quiet: Quiet = False,
) -> None:
    """A recipe with every setting written out, as a run would use it."""
    from finetune.recipe import dump_recipe, load_recipe
    from finetune.recipe_shelf import find_recipe, fitting

    path = find_recipe(recipe)
    loaded = load_recipe(path, fitting(path, changes or []))
    emit({"recipe": loaded.model_dump(mode="json"), "settings_hash": loaded.settings_hash()}, [dump_recipe(loaded).rstrip()], json=json)


def check(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file, or a name from `recipe list`.")],
    changes: Override = None, json: Json = False, quiet: Quiet = False,
) -> None:
    """Whether a recipe is right; every mistake with its line and a hint."""
    from finetune.recipe import load_recipe
    from finetune.recipe_shelf import find_recipe, fitting

    path = find_recipe(recipe)
    loaded = load_recipe(path, fitting(path, changes or []))
    changed = {f"{section}.{key}": value for section, settings in loaded.model_dump(mode="json", exclude_defaults=True).items() for key, value in settings.items()}
    emit({"ok": True, "changed": changed, "settings_hash": loaded.settings_hash()}, [f"{recipe}: fine; {len(changed)} settings differ from the defaults"], json=json)


def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A setting such as training.learning_rate, or a section.")],
    json: Json = False, quiet: Quiet = False,
) -> None:
    """What a setting means, its unit, default and range."""
    from data_tools.errors import BadInput
    from finetune.recipe_problems import all_keys, explain_setting, hint_for_unknown, sections_hint

    keys = [known for known in all_keys() if known == key or known.partition(".")[0] == key]
    if not keys:
        section, _, name = key.partition(".")
        fix = hint_for_unknown(section, name) if name else sections_hint(section)
        raise BadInput("there is no such setting or section", where=key, fix=fix)
    settings = [explain_setting(known) for known in keys]
    lines = [f"{each['key']}\n  {each['meaning']}\n  takes {each['takes']}{_unit(each)}; default: {each['default']}" for each in settings]
    emit({"settings": settings}, lines, json=json)


def _unit(setting: dict[str, str]) -> str:
    return f" ({setting['unit']})" if setting["unit"] else ""
