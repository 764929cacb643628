"""A thinking record in words: the trace that is shown beside the picture, and what the enhanced prompt adds."""

from __future__ import annotations

import re

from data_tools.thinking import Element, ThinkingRecord
from data_tools.thinking_words import NUMBERS, RELATION_WORDS

LABELS = {
    "en": {"elements": "Subject", "relations": "Relations", "composition": "Composition", "environment": "Environment", "lighting": "Lighting",
           "palette": "Palette", "style": "Style", "text": "Text", "details": "Details"},
    "zh": {"elements": "主体", "relations": "空间关系", "composition": "构图", "environment": "环境", "lighting": "光线",
           "palette": "色彩", "style": "风格", "text": "文字", "details": "细节"},
}
OPEN = {"en": "left open", "zh": "未指定"}
WORDS_EN = {value: words[0] for value, words in NUMBERS.items() if 1 < value <= 12}
WORDS_ZH = {1: "一", 2: "两", 3: "三", 4: "四", 5: "五", 6: "六", 7: "七", 8: "八", 9: "九", 10: "十"}


IRREGULAR = {"child": "children", "person": "people", "man": "men", "woman": "women", "mouse": "mice", "goose": "geese", "foot": "feet", "leaf": "leaves",
             "wolf": "wolves", "sheep": "sheep", "fish": "fish", "deer": "deer", "potato": "potatoes", "tomato": "tomatoes"}
SINGULARS = {many: one for one, many in IRREGULAR.items()}
ALWAYS_PLURAL = ("glasses", "scissors", "jeans", "trousers", "headphones", "sunglasses")


def singular(noun: str) -> str:
    """The singular of an English noun phrase, by its usual endings."""
    head, _, last = noun.rpartition(" ")
    if last in SINGULARS:
        last = SINGULARS[last]
    elif re.search(r"(?:s|x|z|ch|sh)es$", last):
        last = last[:-2]
    elif re.search(r"[^aeiou]ies$", last):
        last = last[:-3] + "y"
    elif re.search(r"[^su]s$", last) and len(last) > 3:
        last = last[:-1]
    return f"{head} {last}".strip()


def plural(noun: str) -> str:
    """The plural of an English noun phrase, by its usual endings."""
    head, _, last = noun.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last not in ALWAYS_PLURAL:
        if last.endswith(("s", "x", "z", "ch", "sh")):
            last += "es"
        elif last.endswith("y") and last[-2:-1] not in "aeiou":
            last = last[:-1] + "ies"
        else:
            last += "s"
    return f"{head} {last}".strip()


def _is_plural(element: Element) -> bool:
    return element.count > 1 or singular(element.name) != element.name


def element_words(element: Element, language: str) -> str:
    """ "three red apples", "one cup", "trees", "三个红色苹果"."""
    if language == "zh":
        attributes = "".join(attribute + ("的" if attribute.endswith("着") else "") for attribute in element.attributes)
        return (f"{WORDS_ZH.get(element.count, element.count)}个" if element.count > 1 else "") + attributes + element.name
    name = plural(element.name) if element.count > 1 else element.name
    number = WORDS_EN.get(element.count, str(element.count)) if element.count > 1 else "" if _is_plural(element) else "one"
    return " ".join(filter(None, [number, *element.attributes, name]))


def relation_sentences(record: ThinkingRecord) -> list[str]:
    """One short clause a relation: "the apples are on the table"."""
    by_id = {element.id: element for element in record.elements}
    clauses = []
    for relation in record.relations:
        a, b, words = by_id[relation.a], by_id[relation.b], RELATION_WORDS[relation.relation]
        if record.language == "zh":
            clauses.append(a.name + words[1].format(b=b.name))
            continue
        subject, target = (plural(end.name) if end.count > 1 else end.name for end in (a, b))
        clauses.append(f"the {subject} {'are' if _is_plural(a) else 'is'} {words[0]} the {target}")
    return clauses


def inferred_composition(record: ThinkingRecord) -> str:
    """How the named elements would be laid out, from their number and relations alone."""
    kinds, chinese = {relation.relation for relation in record.relations}, record.language == "zh"
    if not record.elements:
        return ""
    if kinds & {"left_of", "right_of", "next_to"}:
        return "主体左右并列" if chinese else "subjects side by side"
    if kinds & {"on", "above", "under", "below"}:
        return "主体上下排列" if chinese else "one subject above the other"
    if kinds & {"in_front_of", "behind"}:
        return "主体前后分层" if chinese else "foreground and background in layers"
    if record.total_count == 1:
        return "单一主体居中" if chinese else "one subject in the centre"
    return "主体完整且彼此分开" if chinese else "every subject whole and apart"


def trace_fields(record: ThinkingRecord) -> list[tuple[str, str]]:
    """(label, text) of every dimension in the record's language, in the order in which they are thought through."""
    comma = "；" if record.language == "zh" else "; "
    quoted = [f"“{text}”" if record.language == "zh" else f'"{text}"' for text in record.text]
    texts = {
        "elements": comma.join(element_words(element, record.language) for element in record.elements),
        "relations": comma.join(relation_sentences(record)), "composition": record.composition, "environment": record.environment,
        "lighting": record.lighting, "palette": comma.join(record.palette), "style": comma.join(record.style),
        "text": comma.join(quoted), "details": comma.join(record.details),
    }
    return [(label, texts[key] or OPEN[record.language]) for key, label in LABELS[record.language].items()]


def trace_text(record: ThinkingRecord) -> str:
    """The reasoning trace in words, one line a dimension; rendered from the fields, so it says what they say."""
    colon, stop = ("：", "。") if record.language == "zh" else (": ", ".")
    return "\n".join(f"{label}{colon}{text}{stop}" for label, text in trace_fields(record))[:20_000]


def additions(record: ThinkingRecord) -> list[str]:
    """What the enhanced prompt says beyond the prompt itself, the most useful first (the last are dropped to fit).

    Nothing is invented: relations, and elements with their counts and attributes, are said once more in plain clauses,
    then background and style. A prompt of one thing has no structure to repeat and is left alone, and an inferred layout
    stays in the trace: measured on the embedded model, such words drew away from the subject (1.00 to 0.35 right).
    """
    if len(record.elements) < 2:
        return []
    clauses = relation_sentences(record)
    separator = "，" if record.language == "zh" else ", "
    if any(element.count > 1 or element.attributes for element in record.elements):
        clauses.append(separator.join(element_words(element, record.language) for element in record.elements))
    return clauses + [text for text in (record.environment, separator.join(record.style)) if clauses and text]


def joined(prompt: str, clauses: list[str], language: str) -> str:
    """The prompt followed by clauses. The prompt stays letter by letter at the front."""
    if not clauses:
        return prompt
    separator, stop = ("；", "。") if language == "zh" else ("; ", ". ")
    ends = prompt.rstrip()[-1:] in ".。!！?？"
    return prompt.rstrip() + (" " if ends and language == "en" else "" if ends else stop) + separator.join(clauses)
