"""What a prompt names by itself (quoted text, numbers, colours, styles, trigger), and whether a rewriting kept it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from data_tools.thinking_words import CLASSIFIERS, COLOURS, NUMBERS, STYLES

QUOTES = re.compile(r"""["“”]([^"“”]{1,500})["“”]|「([^」]{1,500})」|『([^』]{1,500})』|‘([^’]{1,500})’|(?<!\w)'([^'\n]{1,500})'(?!\w)""")
CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
DIGITS_ZH = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
NUMERAL_ZH = re.compile(rf"([零〇一二两三四五六七八九十百]+)(?=[{CLASSIFIERS}])")
DIGITS = re.compile(r"(?<![\w.#-])(\d{1,6})(?![\w.]*\d)(?!\s*[-x×]?\s*(?:bit|d\b|k\b))", re.IGNORECASE)


def language_of(text: str) -> str:
    """ "zh" where at least a third of the letters are Chinese characters, else "en"."""
    letters = [character for character in text if character.isalpha()]
    return "zh" if letters and sum(bool(CJK.match(letter)) for letter in letters) * 3 >= len(letters) else "en"


def quoted_texts(prompt: str) -> tuple[str, ...]:
    """Literal text between quotes of any of the usual kinds, in order, without the quotes."""
    return tuple(next(group for group in match.groups() if group is not None) for match in QUOTES.finditer(prompt))


def without_quotes(prompt: str) -> str:
    """The prompt with each quoted text replaced by a space; an apostrophe is no quote."""
    return QUOTES.sub(" ", prompt)


def _pattern(spellings: list[str]) -> re.Pattern[str]:
    ordered = sorted(spellings, key=len, reverse=True)
    words = [re.escape(word).replace(r"\ ", r"\s+") for word in ordered if not CJK.search(word)]
    characters = [re.escape(word) for word in ordered if CJK.search(word)]
    # A plural or an -ish form still names the same thing; "redder" or "scared" do not.
    english = rf"(?<![^\W_])(?:{'|'.join(words)})(?:s|ish)?(?![^\W_])" if words else ""
    return re.compile("|".join(part for part in (*characters, english) if part), re.IGNORECASE)


@cache
def _compiled(table: str) -> tuple[re.Pattern[str], Mapping[str, str]]:
    meanings = {"colour": COLOURS, "style": STYLES}[table]
    by_spelling = {" ".join(word.lower().split()): meaning for meaning, words in meanings.items() for word in words}
    return _pattern(list(by_spelling)), by_spelling


def find_words(text: str, table: str) -> Iterator[tuple[str, re.Match[str]]]:
    """(meaning, match) of every word of a table, "colour" or "style", in order of the text."""
    pattern, by_spelling = _compiled(table)
    for match in pattern.finditer(text):
        word = " ".join(match.group(0).lower().split())
        for spelling in (word, word.removesuffix("s"), word.removesuffix("ish")):
            if spelling in by_spelling:
                yield by_spelling[spelling], match
                break


def numeral_zh(text: str) -> int | None:
    """The value of a Chinese numeral below a thousand ("二十三", "一百零五"), or None."""
    total, digit = 0, 0
    for character in text:
        if character in "十百":
            total += (digit or 1) * (10 if character == "十" else 100)
            digit = 0
        elif character in DIGITS_ZH and not (digit and character not in "零〇"):
            digit = DIGITS_ZH[character]
        else:
            return None
    return total + digit


@cache
def _number_words() -> tuple[re.Pattern[str], Mapping[str, int]]:
    values = {word: value for value, words in NUMBERS.items() for word in words if not CJK.search(word)}
    ordered = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in sorted(values, key=len, reverse=True))
    return re.compile(rf"(?<![^\W_])(?:{ordered})(?![^\W_])", re.IGNORECASE), values


def find_numbers(text: str) -> Iterator[tuple[int, re.Match[str]]]:
    """(value, match) of every number in digits or words; Chinese numerals count only before a measure word."""
    pattern, values = _number_words()
    for match in DIGITS.finditer(text):
        yield int(match.group(1)), match
    for match in pattern.finditer(text):
        yield values[" ".join(match.group(0).lower().split())], match
    for match in NUMERAL_ZH.finditer(text):
        value = numeral_zh(match.group(1))
        if value is not None:
            yield value, match


def has_words(text: str, words: str) -> bool:
    """Whether `words` stand in `text` as whole words, without regard to case and width of spaces."""
    inner = re.escape(" ".join(words.split())).replace(r"\ ", r"\s+")
    before = r"(?<![^\W_])" if not CJK.match(words[:1]) else ""
    after = r"(?![^\W_])" if not CJK.match(words[-1:]) else ""
    return re.search(before + inner + after, text, re.IGNORECASE) is not None


def lost(prompt: str, enhanced: str, trigger: str | None = None) -> list[str]:
    """What `prompt` names and `enhanced` does not: one phrase each ('the colour red'); empty when nothing is lost.

    Numbers, colours and styles are compared by meaning, also between English and Chinese; quoted text letter by letter.
    """
    missing = [f'the text "{text}"' for text in quoted_texts(prompt) if text not in enhanced]
    asked, given = without_quotes(prompt), without_quotes(enhanced)
    numbers = {value for value, _ in find_numbers(given)}
    missing += [f"the number {value}" for value in dict.fromkeys(value for value, _ in find_numbers(asked)) if value not in numbers]
    for table in ("colour", "style"):
        kept = {meaning for meaning, _ in find_words(given, table)}
        missing += [f"the {table} {meaning}" for meaning in dict.fromkeys(meaning for meaning, _ in find_words(asked, table)) if meaning not in kept]
    if trigger and trigger.strip() and has_words(prompt, trigger) and not has_words(enhanced, trigger):
        missing.append(f"the trigger {trigger}")
    return missing
