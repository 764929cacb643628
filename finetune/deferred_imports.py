"""Leave parts of libraries unloaded until something really uses them, where libraries load each other for the sake of a name.

A training run whose encodings are made uses torch, one transformer class of diffusers and peft's layers. Those load the
models of transformers to be able to say "is not one of them", and torch's compiler to be told that nothing is compiled: seconds and
a hundred MiB. What stands in for them here says the same, and loads the real thing as soon as it is asked for anything else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

COMPILER = "torch._dynamo"
# Of the compiler's parts, those whose names others take without compiling anything.
COMPILER_PARTS = (f"{COMPILER}._trace_wrapped_higher_order_op",)
# Sizes of tensors may be formulas. Arithmetic on the meta device, where models are built, asks these two about every size: 32 MiB and 0.6 s.
FORMULAS, SIZES = "sympy", "torch.fx.experimental.symbolic_shapes"
# What SIZES says of plain conditions and numbers, and what it is not asked about those.
PLAIN_ANSWERS: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true"), bool),
    "is_nested_int": lambda size: False, "sym_and": lambda *conditions: all(conditions), "sym_or": lambda *conditions: any(conditions),
    "sym_eq": lambda one, other: list(one) == list(other) if isinstance(one, (list, tuple)) else one == other,
}
# What it finds in a tensor of plain sizes: nothing.
SYMBOLS_OF_TENSORS = ("free_unbacked_symbols",)
NEVER_OF_PLAIN = ("guarding_hint_or_throw", "has_guarding_hint")


class _Unused(ModuleType):
    """In the place of a module, until something is asked of it that it cannot answer."""

    def __init__(self, spec: ModuleSpec):
        super().__init__(spec.name)
        self.__spec__, self.__file__ = spec, spec.origin

    def __getattr__(self, name: str) -> Any:
        # Loaders ask every module for such names; they are no use of it. Importing a part of a package asks for its path.
        if name.startswith("__") and not (name == "__path__" and self.__spec__.submodule_search_locations is not None):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._loaded(), name)

    def _loaded(self) -> ModuleType:
        _drop_stand_in(self.__name__)
        return importlib.import_module(self.__name__)


class _UnusedCompiler(_Unused):
    """`torch._dynamo` as long as nobody compiles: it is not at it, breaking, disabling and allowing have nothing to act on, and
    its settings are a file of their own. Anything else that is asked of it loads it, and from then on it alone answers."""

    def __init__(self, spec: ModuleSpec):
        super().__init__(spec)
        self.eval_frame = _LaterModule(f"{COMPILER}.eval_frame")  # whose class nothing is an instance of that was not compiled

    def __getattr__(self, name: str) -> Any:
        if name == "config" and sys.modules.get(COMPILER) is self:
            return self._settings()
        return super().__getattr__(name)

    def _settings(self) -> ModuleType:
        """The compiler's settings, which checkpointing looks at: a file that needs nothing of the rest, which takes it over as it is."""
        name = f"{COMPILER}.config"
        spec = importlib.util.spec_from_file_location(name, Path(self.__spec__.origin).with_name("config.py"))
        sys.modules[name] = self.config = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.config)
        return self.config

    def _loaded(self) -> ModuleType:
        if sys.modules.get(COMPILER) is self:
            for part in COMPILER_PARTS:
                _drop_stand_in(part)
        return super()._loaded()

    def graph_break(self, *told: Any, **options: Any) -> None:
        if sys.modules.get(COMPILER) is not self:
            self._loaded().graph_break(*told, **options)

    def allow_in_graph(self, function: Any) -> Any:
        return function if sys.modules.get(COMPILER) is self else self._loaded().allow_in_graph(function)

    def is_compiling(self) -> bool:
        return False if sys.modules.get(COMPILER) is self else self._loaded().is_compiling()

    def assume_constant_result(self, function: Any) -> Any:
        if sys.modules.get(COMPILER) is not self:
            return self._loaded().assume_constant_result(function)
        function._dynamo_marked_constant = True  # all that the compiler's own does
        return function

    def disable(self, function: Callable | None = None, recursive: bool = True, **options: Any) -> Callable:
        """Calls `function` itself until the compiler is there, which then gets its say."""
        if function is None:
            return lambda later: self.disable(later, recursive, **options)
        if not isinstance(function, FunctionType):
            return self._loaded().disable(function, recursive, **options)
        settled: list[Callable] = []

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            if sys.modules.get(COMPILER) is self:
                return function(*arguments, **named)
            if not settled:
                settled.append(self._loaded().disable(function, recursive, **options))
            return settled[0](*arguments, **named)

        return run


def defer_compiler() -> None:
    """From here on torch's compiler is loaded by its first use; nothing happens where it is loaded already."""
    if COMPILER not in sys.modules and (spec := importlib.util.find_spec(COMPILER)) is not None:
        sys.modules[COMPILER] = _UnusedCompiler(spec)
        sys.modules.update({part: _LaterModule(part) for part in COMPILER_PARTS})


def defer_formulas() -> None:
    """From here on sizes that are formulas are understood when the first one is met; nothing happens where they are already."""
    about_sizes = {name: _answer(name, plain) for name, plain in PLAIN_ANSWERS.items()} | {name: _Later(SIZES, name) for name in NEVER_OF_PLAIN}
    about_sizes |= {name: _answer(name, lambda tensor: set(), _has_plain_sizes) for name in SYMBOLS_OF_TENSORS}
    for module, names in ((FORMULAS, {"Basic": _Later(FORMULAS, "Basic")}), (SIZES, about_sizes)):
        if module not in sys.modules and (spec := importlib.util.find_spec(module)) is not None:
            sys.modules[module] = _Unused(spec)
            vars(sys.modules[module]).update(names)


def _answer(name: str, plain: Callable[..., Any], is_plain: Callable[[Any], bool] | None = None) -> Callable[..., Any]:
    is_plain = is_plain or _is_plain

    def answer(*asked: Any, **options: Any) -> Any:
        if options or not all(is_plain(one) for one in asked):
            return _Later(SIZES, name)(*asked, **options)
        return plain(*asked)

    return answer


def _is_plain(asked: Any) -> bool:
    """A condition that is settled, a size that is a number, or a shape of such."""
    return all(map(_is_plain, asked)) if isinstance(asked, (list, tuple)) else isinstance(asked, int)


def _has_plain_sizes(asked: Any) -> bool:
    """A tensor whose sizes, strides and offset are numbers."""
    return isinstance(getattr(asked, "shape", None), tuple) and all(isinstance(number, int) for number in (*asked.shape, *asked.stride(), asked.storage_offset()))


class _Later:
    """A name of a module that is loaded when it is used. An object can be one of its instances only when its module is there."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    def _found(self) -> Any:
        _drop_stand_in(self._module)
        return getattr(importlib.import_module(self._module), self._name)

    def _is_loaded(self) -> bool:
        return not isinstance(sys.modules.get(self._module), (_LaterModule, _Unused, type(None)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{self._name} is not loaded, and private names of it are not looked for")
        return getattr(self._found(), name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._found()(*arguments, **named)

    def __getitem__(self, key: Any) -> Any:
        return self._found()[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._found()

    def __instancecheck__(self, thing: object) -> bool:
        return self._is_loaded() and isinstance(thing, self._found())

    def __subclasscheck__(self, kind: type) -> bool:
        return self._is_loaded() and issubclass(kind, self._found())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__


class _LaterModule(ModuleType):
    """In the place of a module as long as others only take names from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(self.__name__, name)


def _drop_stand_in(module: str) -> None:
    """Let the next import of `module` find the real one."""
    if isinstance(sys.modules.get(module), (_LaterModule, _Unused)):
        del sys.modules[module]


def defer_part(module: str) -> None:
    """Let `package.part.Name` be written where nobody has imported `package.part` yet; importing it puts the real one in place."""
    package, _, part = module.rpartition(".")
    if module not in sys.modules:
        name_later(importlib.import_module(package), part, module)


def name_later(holder: ModuleType, name: str, module: str) -> None:
    """Let `name` in `holder` stand for a module that is loaded when something from it is used."""
    setattr(holder, name, _LaterModule(module))


@contextmanager
def names_later(library: str, *modules: str) -> Iterator[None]:
    """Within the block, `from library import SomeClass`, and any name taken from `modules` of it, gives something that loads the
    class when it is used. For libraries that load their own classes by name (`_class_to_module` of the package); in others,
    and where a class is loaded already, everything comes as ever.

    A class that is derived from such a name within the block has nothing of it: peft's detached shadow models are the
    one such, which nothing here makes.
    """
    package = importlib.import_module(library)
    plain, places = type(package), getattr(package, "_class_to_module", None)
    if not isinstance(places, dict):
        yield
        return

    class Reluctant(plain):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            place = places.get(name)
            if place is None or not name[:1].isupper() or f"{library}.{place}" in sys.modules:
                return super().__getattr__(name)
            return _Later(f"{library}.{place}", name)

    stand_ins = {name: _LaterModule(name) for name in modules if name not in sys.modules}
    sys.modules.update(stand_ins)
    package.__class__ = Reluctant
    try:
        yield
    finally:
        package.__class__ = plain
        for name in stand_ins:
            _drop_stand_in(name)


def one_process_only() -> None:
    """Let transformers take this torch for one that was built without `torch.distributed`, so that its models load nothing for
    being divided. Nothing happens where they are loaded already."""
    if "transformers.modeling_utils" in sys.modules:
        return
    for place in ("transformers.utils.import_utils", "transformers.utils"):
        importlib.import_module(place).is_torch_distributed_available = _never  # type: ignore[attr-defined]


def _never() -> bool:
    return False
