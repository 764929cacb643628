"""Which modules take LoRA: a preset's name, a preset narrowed to a range of blocks, or a regular expression."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from finetune.errors import BadInput
from finetune.families.protocol import FamilyFacts

RANGED = re.compile(r"(?P<preset>\w+)\[(?P<first>\d+)-(?P<last>\d+)\]")


def resolve_targets(facts: FamilyFacts, targets: str) -> str:
    r"""A full-match regular expression from "attention", "attention[20-39]" (blocks 20 to 39) or an expression.

    Raises BadInput for an expression that does not compile and for a range that ends before it begins.
    """
    if targets in facts.targets:
        return facts.targets[targets]
    ranged = RANGED.fullmatch(targets)
    if ranged and ranged["preset"] in facts.targets:
        first, last = int(ranged["first"]), int(ranged["last"])
        if last < first:
            raise BadInput(f"the range of blocks ends before it begins: {targets}", where="adapter.targets")
        numbers = "|".join(str(number) for number in range(first, last + 1))
        return facts.targets[ranged["preset"]].replace(r"\d+", f"({numbers})")
    try:
        re.compile(targets)
    except re.error as error:
        raise BadInput(f"{targets!r} is neither a preset nor a regular expression: {error}", where="adapter.targets",
                       fix=f"presets of this family: {', '.join(facts.targets)}") from None
    return targets


def keeps_full_precision(facts: FamilyFacts, module: str) -> bool:
    """Whether the module of this full name must not be quantised: it is named in `never_quantise`, or lies below one that is.

    A single block's `proj_out` is not the model's own `proj_out`, so names count from the top.
    """
    return any(fnmatchcase(module, entry) if "*" in entry else module == entry or module.startswith(f"{entry}.") for entry in facts.never_quantise)
