"""Which words a picture is trained with at a step: every possible caption is known before training, so all are encoded once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from finetune.randomness import python_random

# Shuffled captions are drawn from this many fixed orders a caption: a cache can hold them all.
SHUFFLED_VARIANTS = 8


def with_trigger(caption: str, trigger: str | None) -> str:
    """The caption with the trigger in front, unless it is there already (case-insensitive)."""
    if not trigger or trigger.casefold() in caption.casefold():
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def shuffled(caption: str, kept_parts: int, trigger: str | None, seed: int, picture: int, variant: int) -> str:
    """Comma-separated parts in a new order; the first `kept_parts` and the part with the trigger stay in front."""
    parts = [part.strip() for part in caption.replace("，", ",").split(",") if part.strip()]
    is_kept = [place < kept_parts or bool(trigger and trigger.casefold() in part.casefold()) for place, part in enumerate(parts)]
    kept = [part for part, keep in zip(parts, is_kept, strict=True) if keep]
    rest = [part for part, keep in zip(parts, is_kept, strict=True) if not keep]
    python_random(seed, "caption shuffle", variant, picture).shuffle(rest)
    return ", ".join(kept + rest)


@dataclass(frozen=True)
class CaptionChoice:
    """How captions vary. variants: for each picture the captions it may be trained with, triggers included."""

    variants: tuple[tuple[str, ...], ...]
    dropout: float
    seed: int

    def every_caption(self) -> list[str]:
        """All captions that any step can ask for, without repeats, in a stable order."""
        captions = dict.fromkeys(caption for choices in self.variants for caption in choices)
        if self.dropout > 0:
            captions.setdefault("")
        return list(captions)

    def at(self, picture: int, step: int, index: int) -> str:
        """The caption of this use of the picture; "" when it is dropped (classifier-free guidance needs that)."""
        draw = python_random(self.seed, "caption", step, index)
        if draw.random() < self.dropout:
            return ""
        return draw.choice(self.variants[picture])


def caption_choice(captions: Sequence[Sequence[str]], *, trigger: str | None, shuffle: bool, kept_parts: int,
                   dropout: float, seed: int, untriggered: Collection[int] = ()) -> CaptionChoice:
    """captions: for each picture the captions that it has (at least one, may be "").  untriggered: pictures, by number, whose
    captions stay without the trigger."""
    variants = []
    for picture, own in enumerate(captions):
        own = [with_trigger(caption, None if picture in untriggered else trigger) for caption in own]
        if shuffle:
            own = [shuffled(caption, kept_parts, trigger, seed, picture, variant) for caption in own for variant in range(SHUFFLED_VARIANTS)]
        variants.append(tuple(dict.fromkeys(own)))
    return CaptionChoice(tuple(variants), dropout, seed)
