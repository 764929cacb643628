"""What libraries list of themselves is the same as ever, read once, and no further than somebody asks."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from finetune.library_lists import _from_last_list, distributions_when_asked, load_parts_by_name, models_read_once

# How many of its models' files transformers reads to list their names, the names, and some that are used.
LISTED = """
import builtins, contextlib, hashlib, json, sys
from finetune.library_lists import models_read_once
opened, plain = [], builtins.open
builtins.open = lambda file, *options, **named: opened.append(str(file)) or plain(file, *options, **named)
with models_read_once() if sys.argv[1] == "once" else contextlib.nullcontext():
    import transformers
import transformers.models
read = [file for file in opened if "/models/" in file.replace("\\\\", "/") and file.endswith(".py")]
names = [sorted(package._class_to_module.items()) for package in (transformers, transformers.models)]
if sys.argv[1] == "once":
    assert transformers.T5EncoderModel.__module__ == "transformers.models.t5.modeling_t5" and transformers.models.t5.T5EncoderModel is transformers.T5EncoderModel
assert sys.modules["transformers.utils.import_utils"].__spec__.loader.__class__.__name__ == "SourceFileLoader", "the module is as it was found"
print(json.dumps([len(read), len(names[0]), hashlib.sha256(json.dumps(names).encode()).hexdigest()]))
"""


def listed(how: str) -> list:
    return json.loads(subprocess.run([sys.executable, "-c", LISTED, how], capture_output=True, text=True, check=True).stdout)


def test_models_of_transformers_are_listed_by_reading_their_files_once() -> None:
    often, once = listed("as ever"), listed("once")
    assert once[1:] == often[1:] and once[1] > 1000, "the same names, of the same modules"
    assert once[0] <= often[0] / 2 + 1


def test_where_the_models_are_listed_nothing_happens() -> None:
    reading = importlib.import_module("transformers.utils.import_utils")
    before, finders = (reading.define_import_structure, reading.fetch__all__), list(sys.meta_path)
    with models_read_once():
        assert sys.meta_path == finders
    assert (reading.define_import_structure, reading.fetch__all__) == before


LINES = some.sampled_from(['__all__ = ["A", "B"]', "__all__ = [", '    "C",', "]", "class A: pass", "# see __all__", '    __all__ = ["D"]', "", "\x0c", "\r"])


@given(some.lists(LINES, max_size=12).map("\n".join))
def test_the_list_that_a_file_exports_is_its_last(content: str) -> None:
    exported = importlib.import_module("transformers.utils.import_utils").fetch__all__
    assert exported(_from_last_list(content)) == exported(content)


def test_distributions_are_looked_up_for_the_package_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = importlib.metadata.packages_distributions
    everything, looked_into = look_up(), []
    files = importlib.metadata.Distribution.files.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.metadata.Distribution, "files", property(lambda self: looked_into.append(self.name) or files(self)))
    with distributions_when_asked():
        found = importlib.metadata.packages_distributions()
    assert importlib.metadata.packages_distributions is look_up
    assert found["PIL"] == ["pillow"] and "no such package" not in found and found.get("yaml") == ["PyYAML"]
    assert len(looked_into) < len(list(importlib.metadata.distributions())) / 4, "to say so, most need not be looked into"
    assert {package: found[package] for package in everything} == everything and len(found) == len(everything) and set(found) == set(everything)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    parts = tmp_path / "shelf_of_parts" / "models"
    parts.mkdir(parents=True)
    (parts.parent / "__init__.py").write_text("def is_available(): return True\n")
    (parts / "__init__.py").write_text("from .. import is_available\nfrom ..tools import is_there\nif is_there():\n    from .one import One\nfrom .two import Two as Second, make\n")
    (parts.parent / "tools.py").write_text("def is_there(): return True\n")
    for name in ("one", "two"):
        (parts / f"{name}.py").write_text(f"class {name.title()}: pass\ndef make(): return {name.title()}()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield parts
    for name in [name for name in sys.modules if name.startswith("shelf_of_parts")]:
        del sys.modules[name]


def loaded() -> list[str]:
    return sorted(name for name in sys.modules if name.startswith("shelf_of_parts.models."))


def test_a_part_is_loaded_by_the_first_name_from_it(shelf: Path) -> None:
    (shelf / "__init__.py").write_text((shelf / "__init__.py").read_text().replace("from .. import is_available\n", ""))
    load_parts_by_name("shelf_of_parts.models")
    models = importlib.import_module("shelf_of_parts.models")
    assert not loaded() and {"One", "Second", "make", "one", "two"} <= set(dir(models))
    from shelf_of_parts.models import Second  # type: ignore[import-not-found]

    assert loaded() == ["shelf_of_parts.models.two"] and isinstance(models.make(), Second)
    assert models.one.One is models.One and models.is_there() and sys.modules["shelf_of_parts"].models is models
    with pytest.raises(AttributeError, match="has no attribute 'Third'"):
        _ = models.Third
    with pytest.raises(ImportError):
        from shelf_of_parts.models import Third  # type: ignore[import-not-found]  # noqa: F401
    load_parts_by_name("shelf_of_parts.models")
    assert importlib.import_module("shelf_of_parts.models") is models


@pytest.mark.parametrize("more", ["SIZE = 3", "from os import path", "import os", "from .. import models", "if True:\n    from .one import One", "if is_there():\n    from .one import One\nelse:\n    from .two import Two"])
def test_a_package_that_does_more_than_take_names_is_loaded_as_ever(more: str, shelf: Path) -> None:
    (shelf / "__init__.py").write_text(f"from ..tools import is_there\nfrom .two import Two\n{more}\n")
    load_parts_by_name("shelf_of_parts.models")
    assert "shelf_of_parts.models" not in sys.modules
    importlib.import_module("shelf_of_parts.models")
    assert "shelf_of_parts.models.two" in loaded()


PARTS = """
import importlib, inspect, json, sys
from finetune.library_lists import load_parts_by_name
packages, given = sys.argv[1:], {}
for package in packages:
    load_parts_by_name(package)
    parts = importlib.import_module(package)
    assert type(parts).__name__ == "_Parts" and not [name for name in sys.modules if name.startswith(package + ".")], package
for package in packages:
    parts = importlib.import_module(package)
    given[package] = sorted(name for name in dir(parts) if name[:1].isupper())
    assert len(given[package]) > 20 and all(inspect.isclass(getattr(parts, name)) and getattr(parts, name).__module__.startswith(package) for name in given[package]), given[package]
print(json.dumps(given))
"""


def test_packages_of_diffusers_are_of_that_kind_and_give_the_same_classes() -> None:
    packages = ["diffusers.models.transformers", "diffusers.models.autoencoders"]
    given = json.loads(subprocess.run([sys.executable, "-c", PARTS, *packages], capture_output=True, text=True, check=True).stdout)
    for package in packages:
        plain = importlib.import_module(package)
        assert given[package] == sorted(name for name, value in vars(plain).items() if isinstance(value, type)), package
