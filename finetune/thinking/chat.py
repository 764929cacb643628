"""Enhancing with a chat model: what it is told, and how its answer becomes a record. Local models and endpoints share it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from data_tools.thinking import ThinkingRecord, from_json
from data_tools.thinking_named import lost
from data_tools.thinking_reply import first_object, parse_reply
from data_tools.thinking_rules import take_apart, think_by_rules
from data_tools.thinking_schema import RELATIONS, THOUGHT_PROPERTIES
from data_tools.thinking_text import trace_text
from finetune.errors import DataError
from finetune.thinking.enhancers import Question

Messages = list[dict[str, str]]
LONGEST_RAW = 20_000

INSTRUCTIONS = {
    "en": """You prepare prompts for a text-to-image model. First reason, then answer.
Reason inside <think></think>, briefly, one line each: subject, relations in space, composition, environment, lighting, palette, style, literal text.
Then give inside <answer></answer> one JSON object with these keys:
"elements": list of {{"id": "e1", "name": noun, "count": whole number, "attributes": [words]}};
"relations": list of {{"a": id, "relation": one of {relations}, "b": id}};
"composition", "environment", "lighting": short texts; "palette", "style", "text", "details": lists of short texts;
"enhanced": the prompt to draw with, in English, present tense, from the whole to the parts, what is in front last, the style at the end.
Keep every thing, number, colour, style word and relation of the user's prompt. Keep text in quotes letter by letter, in double quotes. Keep names that you do not know as they are. Add only what follows from the prompt. No comment.""",
    "zh": """你为文生图模型准备提示词。先思考，再回答。
在 <think></think> 中简短思考，每项一行：主体、空间关系、构图、环境、光线、色彩、风格、文字。
然后在 <answer></answer> 中给出一个 JSON 对象，键如下：
"elements"：列表 {{"id": "e1", "name": 名词, "count": 整数, "attributes": [词]}}；
"relations"：列表 {{"a": id, "relation": {relations} 之一, "b": id}}；
"composition"、"environment"、"lighting"：短文本；"palette"、"style"、"text"、"details"：短文本列表；
"enhanced"：用于绘图的中文提示词，由整体到局部，最后说明风格。
保留用户提示词中的每个事物、数量、颜色、风格词和关系。引号内的文字逐字保留并加双引号。不认识的名称原样保留。只补充可由提示词推出的内容。不要评论。""",
}
AGAIN = {"en": "Your last answer cannot be used: {reason}. Answer again in full, in the same form.", "zh": "上一个回答不可用：{reason}。请按同样格式完整重答。"}


def first_messages(question: Question) -> Messages:
    """What a chat model is asked."""
    instructions = INSTRUCTIONS[question.language].format(relations=", ".join(RELATIONS))
    trigger = f'\n"{question.trigger}" is a name: keep it once, unchanged.' if question.trigger else ""
    return [{"role": "system", "content": instructions + trigger}, {"role": "user", "content": question.prompt}]


def ask_and_read(question: Question, ask: Callable[[Messages], str], tries: int = 2) -> ThinkingRecord:
    """Ask until an answer can be used, at most `tries` times, telling the model what was wrong; then give up in order."""
    messages = first_messages(question)
    record = take_apart(question.prompt, language=question.language, trigger=question.trigger)
    for _ in range(tries):
        reply = ask(messages)
        record = record_of_reply(question, reply)
        if record.ok:
            return record
        messages = [*messages, {"role": "assistant", "content": reply[:LONGEST_RAW]},
                    {"role": "user", "content": AGAIN[question.language].format(reason=record.reason)}]
    return record


def record_of_reply(question: Question, text: str) -> ThinkingRecord:
    """A record from a model's answer: its JSON object, or else its words with the elements found by rules."""
    by_rules = think_by_rules(question.prompt, language=question.language, trigger=question.trigger)
    raw = text[:LONGEST_RAW].encode("utf-8", "replace").decode()
    by_rules = replace(by_rules, raw=raw, ok=True, reason="")
    reply = parse_reply(text)
    if reply.prompt is None:
        return by_rules.given_up(reply.reason)
    thought = first_object(reply.prompt)
    if thought is None and reply.prompt.lstrip().startswith(("{", "[")):
        return by_rules.given_up("the answer is broken JSON")
    record = replace(by_rules, enhanced=" ".join(reply.prompt.split()), trace=reply.think[:20_000] or by_rules.trace)
    if thought is not None:
        try:
            record = _record_of_thought(by_rules, thought, reply.think)
        except DataError as error:
            return by_rules.given_up(error.what)
    missing = lost(record.prompt, record.enhanced, question.trigger)
    if missing:
        return by_rules.given_up("the enhanced prompt lost " + ", ".join(missing))
    if not question.fits(record.enhanced):
        return by_rules.given_up("the enhanced prompt is longer than the text encoders take")
    return record


def _record_of_thought(by_rules: ThinkingRecord, thought: Mapping[str, Any], think: str) -> ThinkingRecord:
    """The model's own fields. Keys that it left out keep what the rules found; unknown ones are dropped.

    Raises DataError for fields that are there and wrong.
    """
    known = {key: value for key, value in thought.items() if key in THOUGHT_PROPERTIES and value is not None}
    if "enhanced" not in known:
        raise DataError("the answer has no `enhanced` prompt")
    if "elements" in known and "relations" not in known:
        known["relations"] = []
    if "relations" in known and "elements" not in known:
        del known["relations"]
    record = from_json(json.loads(json.dumps(by_rules.to_json() | known)))
    return replace(record, trace=think[:20_000] or trace_text(record))
