"""KeyMap: how other dialects name and fuse a family's modules. Families declare it as data; this file looks names up.

Names are templates: `{}` stands for a block number. Flattened names (dots turned into underscores, as kohya writes them)
are looked up in the flattened templates, never guessed apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

EQUAL, INPUT, REST = "equal", "input", "rest"
CANONICAL = "canonical"


@dataclass(frozen=True)
class Rule:
    """One module of another dialect and what it is here.

    foreign: its name template.  modules: canonical templates, in the order of the rows of a fused weight.
    rows: how many rows each takes: "equal" parts; "input" as many as the layer has inputs; "rest" shares what is left.
    rest_over_input: rows of one "rest" part by inputs of the layer, for writing when that part has no LoRA.
    swap_halves: the two halves of the rows (shift and scale) stand the other way round, when there are just two.
    """

    foreign: str
    modules: tuple[str, ...]
    rows: tuple[str, ...] = ()
    rest_over_input: float = 4.0
    swap_halves: bool = False


def rename(foreign: str, module: str) -> Rule:
    """The same module under another name."""
    return Rule(foreign, (module,))


def fused(foreign: str, *modules: str, rows: tuple[str, ...] = (), rest_over_input: float = 4.0) -> Rule:
    """One foreign module that holds several of ours, stacked by rows; in equal parts when `rows` is not given."""
    return Rule(foreign, modules, rows or (EQUAL,) * len(modules), rest_over_input)


def swapped(foreign: str, module: str) -> Rule:
    """The same module with the order of its two row halves exchanged."""
    return Rule(foreign, (module,), swap_halves=True)


def within(foreign_block: str, block: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """`rules` of one block, put under the block's name in both dialects."""
    return tuple(
        Rule(f"{foreign_block}.{rule.foreign}", tuple(f"{block}.{module}" for module in rule.modules), rule.rows, rule.rest_over_input, rule.swap_halves)
        for rule in rules
    )


@dataclass(frozen=True)
class Place:
    """Where a foreign module goes: `rule` with the block numbers `numbers` filled in."""

    rule: Rule
    numbers: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(fill(module, self.numbers) for module in self.rule.modules)

    @property
    def foreign(self) -> str:
        return fill(self.rule.foreign, self.numbers)


def fill(template: str, numbers: Sequence[str]) -> str:
    """The template with its block numbers."""
    return template.format(*numbers)


@dataclass(frozen=True)
class KeyMap:
    """family: its name in the registry.  modules: canonical templates of every layer that a LoRA of this family may sit on.
    namings: dialect -> rules; a module that no rule of a dialect mentions keeps its canonical name there.
    layouts: file layout -> dialect of names in it, for writing ("canonical" where a layout is not listed).
    unusable: canonical template -> why a LoRA there cannot work.
    text_encoders: pipeline component -> canonical templates inside it.
    kohya_encoders: pipeline component -> the one whose number kohya's files give it, where that is not its own.
    widths: hidden sizes of the published models.  blocks: beginning of a name -> most blocks of a published model.
    loads_with: how people without this tool load a file, for the card: "pipeline", "transformer" or "peft".
    hints: what other tools call this family in `modelspec.architecture` or `ss_base_model_version`, lower case.
    call: arguments that the pipeline's call needs to keep a picture's size, for the card.
    """

    family: str
    modules: tuple[str, ...]
    namings: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)
    text_encoders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kohya_encoders: Mapping[str, str] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    blocks: Mapping[str, int] = field(default_factory=dict)
    loads_with: str = "peft"
    hints: tuple[str, ...] = ()
    call: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def _dotted(self) -> NameTable:
        return NameTable(_by_foreign_name(self._rules()), flat=False)

    @cached_property
    def _flat(self) -> NameTable:
        return NameTable(_by_foreign_name(self._rules()), flat=True)

    @cached_property
    def _encoders(self) -> dict[str, tuple[NameTable, NameTable]]:
        tables = {part: _by_foreign_name([rename(name, name) for name in names]) for part, names in self.text_encoders.items()}
        return {part: (NameTable(rules, flat=False), NameTable(rules, flat=True)) for part, rules in tables.items()}

    def _rules(self) -> list[Rule]:
        own = [rename(name, name) for name in (*self.modules, *self.unusable)]
        return own + [rule for rules in self.namings.values() for rule in rules]

    def place(self, name: str, flat: bool, part: str = "transformer") -> Place | None:
        """Where a foreign module name belongs, or None when this family has no such module.

        flat: dots are underscores.  part: "transformer" or a text encoder's component, as `component` takes it.
        """
        part = self.component(part, flat)
        if part == "transformer":
            return (self._flat if flat else self._dotted).find(name)
        if part not in self._encoders:
            return None
        return self._encoders[part][flat].find(name)

    def component(self, part: str, flat: bool) -> str:
        """The pipeline's component that a file's part is: kohya's third text encoder is the second where there are two."""
        return next((own for own, theirs in self.kohya_encoders.items() if flat and theirs == part), part)

    def why_unusable(self, module: str) -> str | None:
        """Why a LoRA on this canonical module cannot work, or None when it can."""
        for template, reason in self.unusable.items():
            if _pattern(template, flat=False).fullmatch(module):
                return reason
        return None

    def places_for(self, modules: Sequence[str], naming: str) -> list[Place]:
        """The foreign modules, in the order of first need, that together hold the canonical `modules`."""
        table = NameTable([(module, rule) for rule in self.namings.get(naming, ()) for module in rule.modules], flat=False)
        found: dict[str, Place] = {}
        for module in modules:
            place = table.find(module) or Place(rename(module, module), ())
            found.setdefault(place.foreign, place)
        return list(found.values())


def _by_foreign_name(rules: Iterable[Rule]) -> list[tuple[str, Rule]]:
    return [(rule.foreign, rule) for rule in rules]


def _pattern(template: str, flat: bool) -> re.Pattern[str]:
    parts = template.replace(".", "_").split("{}") if flat else template.split("{}")
    return re.compile(r"(\d+)".join(re.escape(part) for part in parts))


class NameTable:
    """Finds the rule one of whose templates a name fits. Names differ mostly in numbers, so they are found by shape."""

    def __init__(self, entries: Iterable[tuple[str, Rule]], flat: bool):
        self._by_shape: dict[str, list[tuple[re.Pattern[str], Rule]]] = {}
        for template, rule in entries:
            shape = re.sub(r"\{\}|\d+", "#", template.replace(".", "_") if flat else template)
            self._by_shape.setdefault(shape, []).append((_pattern(template, flat), rule))

    def find(self, name: str) -> Place | None:
        for pattern, rule in self._by_shape.get(re.sub(r"\d+", "#", name), ()):
            match = pattern.fullmatch(name)
            if match:
                return Place(rule, match.groups())
        return None
