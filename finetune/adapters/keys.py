"""KeyMap: how another dialect names and fuses a family's modules. The declaration is data; families fill it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KeyMap:
    """family: its name in the registry."""

    family: str
    namings: Mapping[str, object] = field(default_factory=dict)
