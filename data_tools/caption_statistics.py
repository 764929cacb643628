"""What the captions of a set have in common: words, tags, who wrote them, and what might be a second trigger."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.caption_cleanup import style_words
from data_tools.caption_edits import parts_of
from data_tools.records import CHINESE, ImageRecord, best_caption

WORD = re.compile(r"[^\W\d_]{2,}(?:['’-][^\W\d_]+)*")
# Words that say nothing about a picture.
COMMON = frozenset(
    "the and with are for from its his her their that this has have into over under near while there two one some each between behind front of on in at an is it to by as or which being".split()
)
TAG_LENGTH = 4  # words; captions whose parts are on average this short are lists of tags
ALMOST_ALL = 0.8


@dataclass(frozen=True)
class CaptionStatistics:
    """captioned: pictures with a plain caption.  sources, languages, kinds: counts of captions.  words: (word or tag, pictures
    whose caption has it), most first.  in_almost_all: words in over 80 % of captions: each acts like a trigger.
    lengths: words (characters in Chinese) of each caption, in the order of the pictures that have one.
    repeated: captions that three or more pictures share.  style: style words found, with counts.
    """

    captioned: int
    pictures: int
    sources: dict[str, int]
    languages: dict[str, int]
    kinds: dict[str, int]
    words: tuple[tuple[str, int], ...]
    are_tags: bool
    in_almost_all: tuple[str, ...]
    lengths: tuple[int, ...]
    repeated: tuple[tuple[str, int], ...]
    style: tuple[tuple[str, int], ...]


def length_of(text: str) -> int:
    """Words, and each Chinese character as one."""
    return len(CHINESE.findall(text)) + len(CHINESE.sub(" ", text).split())


def _terms(text: str, tags: bool) -> set[str]:
    if tags:
        return {part.strip(" .").lower() for part in parts_of(text)} - {""}
    chinese = CHINESE.findall(text)
    pairs = {a + b for a, b in zip(chinese, chinese[1:], strict=False) if a + b in text}
    return {word.lower() for word in WORD.findall(CHINESE.sub(" ", text))} - COMMON | pairs


def caption_statistics(records: Sequence[ImageRecord], *, most: int = 40) -> CaptionStatistics:
    """Counts over the plain captions that would be trained on."""
    captions = [caption for record in records if (caption := best_caption(record.captions))]
    texts = [caption.text for caption in captions]
    parts = [part for text in texts for part in parts_of(text)]
    tags = bool(parts) and len(parts) >= 3 * len(texts) and sum(length_of(part) for part in parts) / len(parts) <= TAG_LENGTH
    counts = Counter(term for text in texts for term in _terms(text, tags))
    every = [caption for record in records for caption in record.captions]
    almost_all = [term for term, count in counts.most_common(50) if len(texts) >= 5 and count > ALMOST_ALL * len(texts)]
    shared = [(text, count) for text, count in Counter(texts).most_common(10) if count >= 3]
    return CaptionStatistics(
        captioned=len(captions), pictures=len(records), sources=dict(sorted(Counter(c.source for c in every).items())), languages=dict(sorted(Counter(c.language for c in captions).items())),
        kinds=dict(sorted(Counter(c.kind for c in every).items())), words=tuple(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]), are_tags=tags, in_almost_all=tuple(almost_all),
        lengths=tuple(length_of(text) for text in texts), repeated=tuple(shared), style=tuple(Counter(word for text in texts for word in style_words(text)).most_common(20)),
    )
