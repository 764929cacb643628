"""Read what libraries list of themselves once, and go no further in it than somebody asks.

At import, transformers reads all its models' files for the names in them, twice; diffusers reads the list of every file that is
installed, and loads each of its transformers and autoencoders to have their names. A run wants one of each: together 1.2 seconds.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

READS_MODELS = "transformers.utils.import_utils"
EXPORTED = "__all__"


class _Changed(MetaPathFinder, Loader):
    """Finds one module as ever, and changes something in it before anybody sees it."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]):
        self._name, self._change = name, change

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self._name else None
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]
        self._loader.exec_module(module)
        self._change(module)


@contextmanager
def models_read_once() -> Iterator[None]:
    """Within the block, transformers reads its models' files for their names once and quickly, and `transformers.models` takes them
    from what `transformers` has read. Nothing happens where they were read already."""
    if READS_MODELS in sys.modules:
        yield
        return
    finder = _Changed(READS_MODELS, _read_once)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _read_once(reading: ModuleType) -> None:
    models, read, exported = Path(reading.__file__ or "").parents[1] / "models", reading.define_import_structure, reading.fetch__all__
    found: dict = {}

    def structure(path: str | Path, prefix: str | None = None) -> dict:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        if folder != models or prefix not in (None, "models"):
            return read(path, prefix)
        if not found:
            found.update(read(models, prefix="models"))
        # `transformers` adds parts of its own to what it is given.
        names_of = found.items()
        return {needs: {name if prefix else name.removeprefix("models."): names for name, names in parts.items()} for needs, parts in names_of}

    reading.define_import_structure = structure
    reading._package_distribution_mapping = _Distributions
    reading.fetch__all__ = lambda content: exported(_from_last_list(content))


def _from_last_list(content: str) -> str:
    """A file's text from the last line on that begins with `__all__`, which is the one that counts: whoever cuts it into lines need not cut all."""
    start = content.rfind("\n" + EXPORTED) + 1
    return content[start:] if start else content


class _Distributions(Mapping):
    """Package -> names of the distributions that it comes from, as `importlib.metadata.packages_distributions` has it. For one package, only
    distributions that can hold it are looked into: the names of all installed files are read for the rest."""

    def __getitem__(self, package: str) -> list[str]:
        able = [distribution for distribution in importlib.metadata.distributions() if package in _listed(distribution, package)]
        return dict(_of_distributions(able))[package]

    def __iter__(self) -> Iterator[str]:
        return iter(_packages_distributions())

    def __len__(self) -> int:
        return len(_packages_distributions())


_packages_distributions = importlib.metadata.packages_distributions


def _listed(distribution: importlib.metadata.Distribution, package: str) -> str:
    """Text in which the distribution names its packages; the package asked for where it has none, and must be looked into."""
    return distribution.read_text("top_level.txt") or distribution.read_text("RECORD") or package


def _of_distributions(some: list[importlib.metadata.Distribution]) -> Mapping[str, list[str]]:
    """What the library's function answers when only these are installed; to others, who may ask at the same time, all are."""
    names = {**vars(importlib.metadata), "distributions": lambda: iter(some)}
    return FunctionType(_packages_distributions.__code__, names)()


@contextmanager
def distributions_when_asked() -> Iterator[None]:
    """Within the block, who wants a list of the distributions of all packages is given one that looks each up when it is asked for."""
    importlib.metadata.packages_distributions = _Distributions  # type: ignore[assignment]
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = _packages_distributions


class _Parts(ModuleType):
    """A package that loads the part of it that a name comes from when the name is asked for."""

    def __init__(self, spec: ModuleSpec, part_of: Mapping[str, tuple[str, str]]):
        super().__init__(spec.name)
        self.__spec__, self.__file__, self.__package__ = spec, spec.origin, spec.name
        self.__path__ = list(spec.submodule_search_locations or ())
        self._part_of = part_of

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._part_of:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, its_name = self._part_of[name]
        found = importlib.import_module(module)
        setattr(self, name, getattr(found, its_name) if its_name else found)
        return vars(self)[name]

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *self._part_of})


def load_parts_by_name(package: str) -> None:
    """From here on `package` loads each of its parts by the first use of a name from it. Nothing happens where it is loaded already, nor where
    it does more at import than to take names from its parts."""
    spec = importlib.util.find_spec(package)
    if package in sys.modules or spec is None or spec.origin is None:
        return
    part_of = _names_taken(ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body, package)
    if part_of:
        parent, _, part = package.rpartition(".")
        sys.modules[package] = _Parts(spec, part_of)
        setattr(importlib.import_module(parent), part, sys.modules[package])


def _names_taken(statements: list[ast.stmt], package: str) -> dict[str, tuple[str, str]]:
    """name -> (module, its name there, "" for the module itself) of a package that does nothing but import from its own
    library, all of it or under a condition that one of those functions states; else nothing."""
    taken: dict[str, tuple[str, str]] = {}
    for statement in statements:
        if isinstance(statement, ast.If) and isinstance(statement.test, ast.Call) and not statement.orelse:
            found = _names_taken(statement.body, package)
        elif isinstance(statement, ast.ImportFrom) and statement.level and statement.module:
            module = importlib.util.resolve_name("." * statement.level + statement.module, package)
            found = {name.asname or name.name: (module, name.name) for name in statement.names}
            if statement.level == 1:
                found.setdefault(statement.module.partition(".")[0], (f"{package}.{statement.module.partition('.')[0]}", ""))
        else:
            found = {}
        if not found:
            return {}
        taken |= found
    return taken
