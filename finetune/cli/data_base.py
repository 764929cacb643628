"""What the data verbs ask a base model: the sizes it trains at and how its text encoders count. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from finetune.errors import BaseModelError

if TYPE_CHECKING:
    from data_tools.token_counts import TextLimit
    from finetune.families.base_models import BaseModel

EMBEDDED_RESOLUTION = 64  # pixels; the embedded model draws icons
USUAL_RESOLUTION, USUAL_MULTIPLE = 1024, 16  # pixels; what most families share, for when no base is named


@dataclass(frozen=True)
class TrainingSizes:
    """resolution: usual edge in pixels.  multiple: every side is a multiple of this many pixels.  said: where they come from.
    longest: side in pixels up to which the base has positions, or None."""

    resolution: int
    multiple: int
    said: str
    longest: int | None = None


def training_sizes(base: str | None, resolution: int | None) -> TrainingSizes:
    """Sizes of the base, or the usual ones without a base; an own resolution wins."""
    if base is None:
        return TrainingSizes(resolution or USUAL_RESOLUTION, USUAL_MULTIPLE, "no --base given: sides in multiples of 16")
    from finetune.families.base_models import EMBEDDED
    from finetune.families.picture_limits import check_size, picture_limits

    located = _located(base)
    facts, limits = located.family.facts, picture_limits(located)
    edge = resolution or (EMBEDDED_RESOLUTION if base == EMBEDDED else facts.resolution)
    check_size(edge, edge, limits, "--resolution")
    said = f"sizes of {base}: about {edge} pixels, sides in multiples of {facts.size_multiple}"
    return TrainingSizes(edge, facts.size_multiple, said if limits.side is None else f"{said}, none longer than {limits.side}", limits.side)


def text_limits(base: str | None) -> list[TextLimit]:
    """One limit for each text encoder of the base, counted by its own tokenizers; none without a base."""
    if base is None:
        return []
    from data_tools.token_counts import TextLimit

    located = _located(base)
    tokenizers = _tokenizers(located)

    def counter(encoder: str):
        return lambda text: located.family.token_counts(tokenizers, text)[encoder][0]

    return [TextLimit(encoder, limit, counter(encoder)) for encoder, (_, limit) in located.family.token_counts(tokenizers, "").items()]


def _located(base: str) -> BaseModel:
    from finetune.families.base_models import locate_base

    return locate_base(base, parts=())


def _tokenizers(located: BaseModel) -> SimpleNamespace:
    """The pipeline's tokenizers and nothing else of it, under the names that it gives them."""
    from finetune.families.loading import component_class
    from finetune.families.model_index import component_slots, read_model_index

    found = SimpleNamespace()
    for slot, (library, name) in component_slots(read_model_index(located.folder)).items():
        folder = located.folder / slot
        if not slot.startswith(("tokenizer", "processor")):
            continue
        try:
            setattr(found, slot, component_class(library, name, folder).from_pretrained(folder))
        except (OSError, ValueError, ImportError) as error:
            raise BaseModelError(f"its {slot} cannot be loaded: {' '.join(str(error).split())[:200]}", where=str(folder)) from None
    return found
