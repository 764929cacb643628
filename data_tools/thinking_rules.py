"""Thinking offline: a record of what a prompt or caption holds, by rules alone; no model, no network, no chance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from data_tools.thinking import FORBIDDEN, ThinkingRecord
from data_tools.thinking_clauses import read_chinese, read_english
from data_tools.thinking_named import QUOTES, find_words, language_of, lost, quoted_texts
from data_tools.thinking_text import additions, inferred_composition, joined, trace_text
from data_tools.thinking_words import COMPOSITION, LIGHTING, PLACES_EN, PLACES_ZH_WORDS

LONGEST_PROMPT = 10_000
# Rules read this much; the rest of a very long prompt is kept but not taken apart.
LONGEST_READ = 2_000
ENVIRONMENT_EN = re.compile(
    rf"(?:\b(?:on|in|at|against|with|inside|over)\s+(?:(?:a|an|the)\s+)?|(?<=[,.;])\s*|^\s*)((?:[\w-]+\s+){{0,3}}?(?:{'|'.join(PLACES_EN)}))\b(?!\s+of\b)", re.IGNORECASE)
ENVIRONMENT_ZH = re.compile(rf"(?:在)?([^，。；、,在和与上里的]{{0,5}}的?[^，。；、,在和与上里的]{{0,4}}(?:{'|'.join(PLACES_ZH_WORDS)}))(?:上面|里面|上|里|中|下)?的?")
QUALITY = re.compile(r"\b(?:masterpiece|(?:best|high|highest)\s+quality|(?:highly\s+|very\s+|ultra\s+|intricate(?:ly)?\s+)?detail(?:ed|s)|sharp\s+focus|[48]k|u?hd|"
                     r"award[- ]winning|trending\s+on\s+artstation|intricate)\b|高清|高质量|杰作|细节丰富|超清", re.IGNORECASE)


# "brndx style", "某某风格": a style that no list knows.
NAMED_STYLE = re.compile(r"(?:\bin\s+(?:the\s+|an?\s+)?)?(\b[\w-]+\s+style\b|[^，。；、,\s的]{1,8}风格)(?:的)?", re.IGNORECASE)
WRITTEN = re.compile(r"\b(?:that\s+says|saying|that\s+reads|reading|with\s+the\s+(?:text|words?)|labell?ed)\s*$|(?:上?写着|写有|标着|写上)\s*$", re.IGNORECASE)


def _cut_quotes(text: str) -> str:
    """The text without quoted parts and without the words that announce them."""
    parts, start = [], 0
    for match in QUOTES.finditer(text):
        parts.append(WRITTEN.sub("", text[start : match.start()]))
        start = match.end()
    return " ".join([*parts, text[start:]])


def _take(text: str, pattern: re.Pattern[str]) -> tuple[list[str], str]:
    """What matches (group 1 where there is one), and the text with it cut out; a comma marks the cut."""
    found = [" ".join((match.group(match.re.groups and 1) or "").split()) for match in pattern.finditer(text)]
    return list(dict.fromkeys(filter(None, found))), pattern.sub(" , ", text)


def _take_styles(text: str) -> tuple[list[str], str]:
    styles: list[str] = []
    while True:
        first = next(find_words(text, "style"), None)
        if first is None:
            named, text = _take(text, NAMED_STYLE)
            return list(dict.fromkeys([*styles, *named])), text
        meaning, match = first
        before, after = text[: match.start()], text[match.end() :]
        # "an icon of a dog" names a subject after the style word; the word goes, the subject stays.
        styles.append(match.group(0) if language_of(match.group(0)) == "zh" else meaning)
        text = re.sub(r"\bin\s+(?:an?\s+|the\s+)?$", "", before) + " , " + re.sub(r"^\s*(?:style\b|风格|风)?(?:的|\s+of\b)?", "", after)


def _words_pattern(words: Sequence[str]) -> re.Pattern[str]:
    english = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True) if word.isascii())
    chinese = "|".join(word for word in sorted(words, key=len, reverse=True) if not word.isascii())
    return re.compile(rf"\b(?:{english})\b|{chinese}", re.IGNORECASE)


LIGHTING_PATTERN, COMPOSITION_PATTERN = _words_pattern(LIGHTING), _words_pattern(COMPOSITION)


def _readable(prompt: str) -> str:
    return FORBIDDEN.sub(" ", prompt).encode("utf-8", "replace").decode()


def take_apart(prompt: str, *, language: str | None = None, trigger: str | None = None) -> ThinkingRecord:
    """The record of a prompt with all fields but `enhanced` (which is the prompt itself). Never raises for any text of
    at most `LONGEST_PROMPT` characters; longer ones are cut there."""
    prompt = prompt[:LONGEST_PROMPT].encode("utf-8", "replace").decode()
    text = _readable(prompt[:LONGEST_READ])
    language = language or language_of(text)
    quoted = tuple(dict.fromkeys(quote for quote in quoted_texts(text) if quote.strip()))[:32]
    text = _cut_quotes(text)
    if trigger and trigger.strip():
        text = re.sub(re.escape(trigger) + r"(?:\s+style\b|风格)?", " , ", text, flags=re.IGNORECASE)
    # "two oranges" are fruit.
    palette = list(dict.fromkeys(match.group(0).lower() for _, match in find_words(text, "colour") if match.group(0)[-1] not in "sS"))
    styles, text = _take_styles(text)
    lighting, text = _take(text, LIGHTING_PATTERN)
    composition, text = _take(text, COMPOSITION_PATTERN)
    details, text = _take(text, QUALITY)
    environment, text = _take(text, ENVIRONMENT_ZH if language == "zh" else ENVIRONMENT_EN)
    scene = read_chinese(text) if language == "zh" else read_english(text)
    comma = "，" if language == "zh" else ", "
    record = ThinkingRecord(
        prompt=prompt, language=language, elements=tuple(scene.elements), relations=tuple(scene.relations[:256]),
        composition=comma.join(composition)[:1000], environment=comma.join(environment)[:1000], lighting=comma.join(lighting)[:1000],
        palette=tuple(palette[:64]), style=tuple(style[:200] for style in styles[:64]), text=quoted, details=tuple(details[:64]),
        trigger=trigger or None, enhanced=prompt,
    )
    record = replace(record, composition=record.composition or inferred_composition(record))
    return replace(record, trace=trace_text(record))


def think_by_rules(prompt: str, *, language: str | None = None, trigger: str | None = None,
                   fits: Callable[[str], bool] = lambda text: True) -> ThinkingRecord:
    """Take a prompt apart and say its parts once more, as far as `fits` (the family's token limits) allows.

    The enhanced prompt begins with the prompt itself, so nothing it names can be lost; it is the same for the same
    prompt always. Where not even the prompt alone fits, the record is given up and says so.
    """
    record = take_apart(prompt, language=language, trigger=trigger)
    if not record.prompt.strip():
        return record.given_up("the prompt is empty")
    if not fits(record.prompt):
        return record.given_up("the prompt alone is longer than the text encoders take")
    clauses: list[str] = []
    for clause in additions(record):
        if fits(joined(record.prompt, [*clauses, clause], record.language)):
            clauses.append(clause)
    enhanced = joined(record.prompt, clauses, record.language)
    missing = lost(record.prompt, enhanced, trigger)
    if missing or len(enhanced) > LONGEST_PROMPT or FORBIDDEN.search(enhanced):
        return record.given_up("the enhanced prompt lost " + ", ".join(missing) if missing else "the prompt cannot be added to")
    return replace(record, enhanced=enhanced)
