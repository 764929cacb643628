"""English and Chinese prompts taken apart into elements and relations, by word lists and word order alone.

No grammar model: what a rule cannot place stays part of an element's name, so no word of the prompt disappears from
the record. Wrong guesses cost nothing downstream, because the prompt itself always opens the enhanced prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from data_tools.thinking import Element, Relation
from data_tools.thinking_named import find_numbers, find_words, numeral_zh
from data_tools.thinking_schema import MOST_COUNT, MOST_ELEMENTS
from data_tools.thinking_text import singular
from data_tools.thinking_words import (
    ADJECTIVES_EN, ADJECTIVES_ZH, CLASSIFIERS, PLACES_ZH, RELATIONS_EN, TURNED_EN, VERBS_ZH,
)

OPENINGS_EN = re.compile(r"^\s*(?:an?|the)?\s*(?:picture|image|photo|photograph|icon|drawing|painting|illustration|sketch|poster|logo|sticker)s?\s+of\b", re.IGNORECASE)
DETERMINERS_EN = {"a", "an", "the", "some", "his", "her", "its", "their", "my", "your", "this", "that", "these", "those", "many", "several",
                  "of", "is", "are", "there", "one", "at", "in", "by", "to", "from", "for", "as", "it", "has", "have", "being", "stands", "sits", "lies"}
RELATION_OF_EN = {phrase: name for name, phrases in RELATIONS_EN.items() for phrase in phrases}
RELATION_EN = re.compile(r"(?<![\w-])(" + "|".join(sorted(map(re.escape, RELATION_OF_EN), key=len, reverse=True)) + r")(?![\w-])", re.IGNORECASE)

PLACE_OF_ZH = {word: name for name, words in PLACES_ZH.items() for word in words}
PLACE_ZH = "|".join(sorted(PLACE_OF_ZH, key=len, reverse=True))
AT_ZH = re.compile(rf"^(?P<a>.*?)(?P<pose>[坐站躺趴放停立挂]?)在(?P<b>.+?)的?(?P<place>{PLACE_ZH})(?P<rest>.*)$")
OF_ZH = re.compile(rf"^(?P<b>.+?)(?P<place>{PLACE_ZH})的(?P<a>.+)$")
VERB_OF_ZH = {word: name for name, words in VERBS_ZH.items() for word in words}
VERB_ZH = re.compile("^(?P<a>.+?)(?P<verb>" + "|".join(VERB_OF_ZH) + ")(?P<b>.+)$")
LONGEST_CLAUSE_ZH = 200
COUNT_ZH = re.compile(rf"^(?:有|是)?([零一二两三四五六七八九十百]+|\d+)([{CLASSIFIERS}])")


@dataclass
class Scene:
    """Elements and relations as they are found; the same thing named twice is one element."""

    elements: list[Element] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)

    def add(self, name: str, count: int, attributes: list[str]) -> str | None:
        """The id of this element, or None when there is nothing to name or no room left."""
        name = name.strip(" -–—'’.:()[]")[:200]
        if not name or not any(character.isalnum() for character in name) or len(self.elements) >= MOST_ELEMENTS:
            return None
        attributes = list(dict.fromkeys(attributes))
        for known in self.elements:
            if known.name == name and (not attributes or tuple(attributes) == known.attributes):
                return known.id
        element = Element(f"e{len(self.elements) + 1}", name, min(max(count, 1), MOST_COUNT), tuple(attributes))
        self.elements.append(element)
        return element.id

    def relate(self, a: str | None, relation: str, b: str | None) -> None:
        """Note a relation, unless it says nothing or contradicts what stands already between the two."""
        if a and b and a != b and not any({known.a, known.b} == {a, b} for known in self.relations):
            self.relations.append(Relation(a, relation, b))


def _phrase_en(scene: Scene, phrase: str) -> str | None:
    count, attributes = 1, []
    numbers = [found for found in find_numbers(phrase) if found[1].start() == len(phrase) - len(phrase.lstrip())]
    if numbers:
        count = numbers[0][0]
        phrase = phrase[numbers[0][1].end() :]
    for meaning, match in reversed(list(find_words(phrase, "colour"))):
        # "orange" at the end is the fruit, everywhere else the colour.
        if phrase[match.end() :].strip():
            attributes.insert(0, meaning)
            phrase = phrase[: match.start()] + " " + phrase[match.end() :]
    words = []
    for word in re.findall(r"[^\s]+", phrase.lower()):
        if word in ADJECTIVES_EN:
            attributes.append(word)
        elif word not in DETERMINERS_EN or words:
            words.append(word)
    while words and words[-1] in DETERMINERS_EN:
        words.pop()
    name = " ".join(words)
    if not name and attributes:
        # "a light": the only word is the thing itself.
        name = attributes.pop()
    return scene.add(singular(name) if count > 1 else name, count, attributes)


def _group_en(scene: Scene, text: str) -> list[str]:
    found = (_phrase_en(scene, part) for part in re.split(r"\s+(?:and|plus|&)\s+|^and\s+", text) if part.strip())
    return [element for element in found if element]


def read_english(text: str) -> Scene:
    """Elements and relations of an English text from which quotes, style, light and background were taken out."""
    scene = Scene()
    for clause in re.split(r"[,.;:!?\n|]+", OPENINGS_EN.sub("", text)):
        parts = RELATION_EN.split(clause)
        groups = [_group_en(scene, part) for part in parts[::2]]
        names = [" ".join(word.lower().split()) for word in parts[1::2]]
        for index, name in enumerate(names):
            left, right = groups[index], groups[index + 1]
            # "a cat on a box and a dog on a chair": the last of a middle group begins the next relation.
            subjects = left[-1:] if index else left
            objects = right[:-1] if index + 1 < len(names) and len(right) > 1 else right
            for a in subjects:
                for b in objects:
                    scene.relate(*((b, "around", a) if name in TURNED_EN else (a, RELATION_OF_EN[name], b)))
    return scene


def _phrase_zh(scene: Scene, phrase: str, pose: str = "") -> str | None:
    phrase, count, attributes = phrase.strip(), 1, []
    numeral = COUNT_ZH.match(phrase)
    if numeral:
        count = int(numeral.group(1)) if numeral.group(1).isdigit() else numeral_zh(numeral.group(1)) or 1
        phrase = phrase[numeral.end() :]
    for _, match in reversed(list(find_words(phrase, "colour"))):
        if phrase[match.end() :].strip("的"):
            attributes.insert(0, match.group(0))
            phrase = phrase[: match.start()] + phrase[match.end() :].removeprefix("的")
    while True:
        adjective = next((word for word in sorted(ADJECTIVES_ZH, key=len, reverse=True) if re.match(rf"{word}的?.", phrase) and (f"{word}的" in phrase)), None)
        if adjective is None:
            break
        attributes.append(adjective)
        phrase = phrase[len(adjective) :].removeprefix("的")
    if pose:
        attributes.append(f"{pose}着")
    return scene.add(phrase.strip("的 着"), count, attributes)


def _group_zh(scene: Scene, text: str, pose: str = "") -> list[str]:
    found = (_phrase_zh(scene, part, pose) for part in re.split(r"和|与|以及|跟", text) if part.strip())
    return [element for element in found if element]


def read_chinese(text: str) -> Scene:
    """Elements and relations of a Chinese text from which quotes, style, light and background were taken out."""
    scene = Scene()
    for clause in re.split(r"[，。；、：！？,.;:!?\n|]+", text):
        if len(clause) > LONGEST_CLAUSE_ZH:
            # The patterns below take quadratic time; no caption has such a clause.
            scene.add(clause, 1, [])
            continue
        at, of, verb = AT_ZH.match(clause), OF_ZH.match(clause), VERB_ZH.match(clause)
        match = at or of or verb
        if not match:
            _group_zh(scene, clause)
            continue
        relation = VERB_OF_ZH[match["verb"]] if match is verb else PLACE_OF_ZH[match["place"]]
        rest = match["rest"].removeprefix("的") if match is at else ""
        subjects = _group_zh(scene, match["a"] or rest, at["pose"] if match is at else "")
        for b in _group_zh(scene, match["b"]):
            for a in subjects:
                scene.relate(a, relation, b)
    return scene
