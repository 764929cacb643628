"""How large a picture a base can be given: some have a table of positions that ends, and say nothing where it is left."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from finetune.errors import BadInput
from finetune.families.protocol import PictureLimits

if TYPE_CHECKING:
    from finetune.families.base_models import BaseModel


NO_LIMITS = PictureLimits()


def picture_limits(base: BaseModel) -> PictureLimits:
    """Those of a base, from its transformer's `config.json`."""
    limits = base.family.facts.limits
    return limits(json.loads((base.folder / "transformer" / "config.json").read_text(encoding="utf-8"))) if limits else NO_LIMITS


def check_size(height: int, width: int, limits: PictureLimits, where: str | None = None) -> None:
    """Raises BadInput for a picture that is larger than the limits."""
    if limits.side is not None and max(height, width) > limits.side:
        raise BadInput(f"{width}x{height} is more than this base has positions for: {limits.side} pixels a side", where=where, fix="choose a smaller size")
    if limits.pixels is not None and height != width and height * width > limits.pixels:
        edge = int(limits.pixels**0.5)
        raise BadInput(f"{width}x{height} is more than this base has positions for: as many pixels as {edge}x{edge}, unless square", where=where, fix="choose a smaller size, or a square")
