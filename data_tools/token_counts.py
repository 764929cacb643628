"""How many tokens captions take in each text encoder, and which words fall off the end."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from data_tools.records import CHINESE

# From typical captions: a word of English is about 1.35 tokens, a Chinese character about one.
TOKENS_A_WORD = 1.35
TOKENS_A_CHARACTER = 1.0
SPECIAL_TOKENS = 2


@dataclass(frozen=True)
class TextLimit:
    """One text encoder. limit: tokens it reads, special ones included.  count: text -> tokens with special ones.

    exact: False where `count` is an estimate because the tokenizer is not at hand.
    """

    encoder: str
    limit: int
    count: Callable[[str], int]
    exact: bool = True


@dataclass(frozen=True)
class TokenSummary:
    """Of one encoder over a set: counts in the order of the captions, and which of them are cut."""

    encoder: str
    limit: int
    exact: bool
    counts: tuple[int, ...]

    @property
    def cut(self) -> list[int]:
        """Indices of captions longer than the encoder reads."""
        return [i for i, count in enumerate(self.counts) if count > self.limit]

    @property
    def typical(self) -> float:
        """The median count, 0 without captions."""
        return float(median(self.counts)) if self.counts else 0.0


def estimate(text: str) -> int:
    """Tokens from words and characters alone, for when no tokenizer is at hand."""
    chinese = len(CHINESE.findall(text))
    words = len(re.findall(r"[^\W_]+|[^\w\s]", CHINESE.sub(" ", text)))
    return math.ceil(words * TOKENS_A_WORD + chinese * TOKENS_A_CHARACTER) + SPECIAL_TOKENS


def count_tokens(captions: Sequence[str], limits: Sequence[TextLimit]) -> list[TokenSummary]:
    """Counts of every caption in every encoder."""
    return [TokenSummary(limit.encoder, limit.limit, limit.exact, tuple(limit.count(text) for text in captions)) for limit in limits]


def read_and_cut(text: str, limit: TextLimit) -> tuple[str, str]:
    """(what the encoder reads, what falls off), cut between words (characters in Chinese); found by bisection."""
    if limit.count(text) <= limit.limit:
        return text, ""
    ends = [match.end() for match in re.finditer(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", text)]
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high + 1) // 2
        if limit.count(text[: ends[middle - 1]]) <= limit.limit:
            low = middle
        else:
            high = middle - 1
    place = ends[low - 1] if low else 0
    return text[:place], text[place:].strip()
