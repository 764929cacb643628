"""Recipe: every decision of a run, checked before anything heavy is imported. Loads TOML, applies overrides, writes back.

All mistakes of a file are reported at once, each with file, line, key and a hint.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError, model_validator

from data_tools.errors import BrushworkError
from finetune.errors import RecipeError
from finetune.recipe_lines import Key
from finetune.recipe_problems import (
    all_keys, entry_model, hint_for_unknown, may_be_left_out, sections_hint, shown, takes_only_text, wrong_entry, wrong_value,
)
from finetune.recipe_rules import broken_rules
from finetune.recipe_settings import (
    SECTIONS, AdapterSettings, BaseSettings, DataSettings, ObjectiveSettings, PublishSettings, SampleSettings, Section, TrackingSettings, TrainingSettings,
    ValidationSettings,
)
from finetune.recipe_text import RecipeText, read_recipe_text

__all__ = ["Recipe", "all_keys", "dump_recipe", "load_recipe"]

# Where pictures lie shapes nothing: what they are is told from their bytes.
PLACES = ("folder", "regularisation_folder")


class Recipe(Section):
    """Every decision of a run. Immutable; `recipe.training.learning_rate` and so on."""

    base: BaseSettings
    data: DataSettings = DataSettings()
    adapter: AdapterSettings = AdapterSettings()
    training: TrainingSettings = TrainingSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    samples: SampleSettings = SampleSettings()
    validation: ValidationSettings = ValidationSettings()
    tracking: TrackingSettings = TrackingSettings()
    publish: PublishSettings = PublishSettings()

    @model_validator(mode="after")
    def _rules_hold(self) -> Recipe:
        broken = list(broken_rules({name: getattr(self, name) for name in SECTIONS}))
        if broken:
            raise ValueError("; ".join(f"{rule.key} {rule.what}" for rule in broken))
        return self

    def settings(self) -> dict[str, Any]:
        """Every setting as `section.key` -> value, in the order of the file; paths as text."""
        return {f"{name}.{key}": value for name, section in self.model_dump(mode="json").items() for key, value in section.items()}

    def shaping(self) -> dict[str, Any]:
        """What shapes the adapter: all settings but where the pictures lie and where numbers and result go."""
        found = {key: value for key, value in self.settings().items() if key.rpartition(".")[2] not in PLACES and not key.startswith(("publish.", "tracking."))}
        found["data.also"] = [{key: value for key, value in entry.items() if key not in PLACES} for entry in found["data.also"]]
        return found

    def settings_hash(self) -> str:
        """64 hex digits over `shaping`."""
        return hashlib.sha256(json.dumps(self.shaping(), sort_keys=True).encode()).hexdigest()


class _Origin(NamedTuple):
    """Where a value was written: a recipe text, or a `--set`."""

    text: RecipeText
    overrides: Mapping[Key, str]

    def of(self, key: Key) -> str:
        return self.overrides.get(key[:2]) or self.text.place(key)


def load_recipe(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = (), *, of_run: bool = False) -> Recipe:
    """A checked recipe from a TOML file, or from a mapping of sections; `overrides` are texts like "training.steps=200".

    Relative folders of pictures become absolute: they count from the recipe file, in an override from the working directory.
    of_run: a run wrote it, perhaps before this version refused some setting that nothing reads: such a setting of the file is then at its
    default. Raises RecipeError with every mistake found.
    """
    problems: list[BrushworkError] = []
    if isinstance(source, Mapping):
        text, folder = RecipeText.of_mapping(source), Path.cwd()
    else:
        text, folder = read_recipe_text(Path(source)), Path(source).parent.absolute()
    content = {name: dict(section) if isinstance(section, Mapping) else section for name, section in text.content.items()}
    _make_absolute(content, folder)
    written = _apply_overrides(content, overrides, problems)
    recipe = _check(content, _Origin(text, written), problems, of_run)
    if recipe is None or problems:
        raise RecipeError(problems)
    return recipe


def _make_absolute(content: dict[str, Any], start: Path) -> None:
    for name, section in content.items():
        if name not in SECTIONS or not isinstance(section, dict):
            continue
        if name == "data" and isinstance(section.get("also"), (list, tuple)):
            section["also"] = [dict(entry) if isinstance(entry, Mapping) else entry for entry in section["also"]]
        further = section.get("also") if name == "data" else None
        for table in [section, *(entry for entry in (further if isinstance(further, list) else []) if isinstance(entry, dict))]:
            for place in PLACES:
                if isinstance(table.get(place), (str, Path)) and str(table[place]):
                    table[place] = str(start / Path(table[place]).expanduser())


def _apply_overrides(content: dict[str, Any], overrides: Sequence[str], problems: list[BrushworkError]) -> dict[Key, str]:
    """Write the overrides into `content`; returns where each came from."""
    written: dict[Key, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        section, _, name = key.strip().partition(".")
        place = f"--set {override[:100]}"
        if not equals or not name:
            problems.append(BrushworkError("not of the form section.key=value", where=place, fix="for example --set training.learning_rate=1e-4"))
            continue
        if section not in SECTIONS or name not in SECTIONS[section].model_fields:
            fix = hint_for_unknown(section, name)
            problems.append(BrushworkError(f"there is no setting `{section}.{name}`", where=place, fix=fix))
            continue
        if (section, name) in written and written[section, name] != place:
            problems.append(BrushworkError(f"`{section}.{name}` is set twice", where=place, fix=f"it was also given as {written[section, name]}"))
        written[section, name] = place
        target = content.setdefault(section, {})
        if isinstance(target, dict):
            _set(target, section, name, value.strip())
    return written


def _set(target: dict[str, Any], section: str, name: str, value: str) -> None:
    field = SECTIONS[section].model_fields[name]
    if value == "none" and may_be_left_out(field):
        target.pop(name, None)
        return
    target[name] = _value(value, as_text=takes_only_text(field))
    given = {name: target[name]}
    _make_absolute({section: given}, Path.cwd())
    target |= given


def _value(text: str, as_text: bool) -> Any:
    """A command-line value as TOML reads it; a bare word is text."""
    try:
        value = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    if set(value) != {"value"} or (as_text and not isinstance(value["value"], str)):
        return text
    return value["value"]


def _check(content: Mapping[str, Any], origin: _Origin, problems: list[BrushworkError], of_run: bool) -> Recipe | None:
    """Collect every problem; the recipe when there was none. of_run: as in `load_recipe`."""
    for name in content:
        if name not in SECTIONS:
            fix = sections_hint(str(name))
            problems.append(BrushworkError(f"unknown section or setting {shown(name)}", where=origin.of((name,)), fix=fix))
    valid: dict[str, Section] = {}
    for name, section in SECTIONS.items():
        given = content.get(name, {})
        if not isinstance(given, dict):
            problems.append(BrushworkError(f"`{name}` is a section, not a value", where=origin.of((name,)), fix=f"write [{name}] and its settings below it"))
            continue
        found = list(_section_problems(name, given, origin))
        problems.extend(found)
        if not found:
            valid[name] = section.model_validate(given)
    for rule in broken_rules(valid):
        part, key = rule.key.split(".")
        if of_run and rule.is_idle and (part, key) not in origin.overrides:
            valid[part] = valid[part].model_copy(update={key: SECTIONS[part].model_fields[key].default})
            continue
        problems.append(BrushworkError(f"`{rule.key}` {rule.what}", where=origin.of((part, key)), fix=rule.fix))
    return Recipe(**valid) if not problems else None


def _section_problems(name: str, given: Mapping[str, Any], origin: _Origin) -> Iterator[BrushworkError]:
    section = SECTIONS[name]
    try:
        section.model_validate(given)
        return
    except ValidationError as error:
        found = list(reversed(error.errors(include_url=False, include_context=False)))
    entries = {fault["loc"][:3]: fault["type"] for fault in found if _is_in_an_entry(section, fault["loc"])}
    faults = {str(fault["loc"][0]): fault["type"] for fault in found if fault["loc"][:3] not in entries}
    for (key, number, part), kind in reversed(entries.items()):
        what, fix = wrong_entry(name, str(key), (number, str(part)), kind, given[key][number])
        yield BrushworkError(what, where=origin.of((name, str(key), str(number), str(part))), fix=fix)
    misspelt = {hint_for_unknown(name, key) for key, kind in faults.items() if kind == "extra_forbidden"}
    for key, kind in reversed(faults.items()):
        if kind == "missing" and f"did you mean `{name}.{key}`?" in misspelt:
            continue
        place = origin.of((name, key))
        if kind == "extra_forbidden":
            yield BrushworkError(f"there is no setting {shown(f'{name}.{key}')}", where=place, fix=hint_for_unknown(name, key))
        elif kind == "missing":
            meaning = section.model_fields[key].description
            yield BrushworkError(f"`{name}.{key}` is missing", where=place, fix=f"add it under [{name}]: {meaning}")
        else:
            what, fix = wrong_value(name, key, given[key])
            yield BrushworkError(what, where=place, fix=fix)


def _is_in_an_entry(section: type[Section], place: tuple[Any, ...]) -> bool:
    """Whether a fault lies inside one table of a list of tables."""
    field = section.model_fields.get(str(place[0]))
    return field is not None and len(place) >= 3 and isinstance(place[1], int) and entry_model(field) is not None


def dump_recipe(recipe: Recipe) -> str:
    """TOML text with every setting; `load_recipe` reads back an equal recipe. Settings that are left out stay left out."""
    lines = []
    for name, section in recipe.model_dump(mode="json").items():
        lines.append(f"[{name}]")
        lines.extend(f"{key} = {_toml(value)}" for key, value in section.items() if value is not None)
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON escapes are TOML escapes, but JSON leaves DEL as it is and TOML does not take it.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(key)} = {_toml(item)}' for key, item in value.items())}}}"
    return repr(value)
