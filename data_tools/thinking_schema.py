"""The shape of a thinking record as JSON Schema, and the small part of JSON Schema that it needs, interpreted.

One table serves three purposes: checking what was read, telling an endpoint what to answer (`response_format`), and
documenting the file. Only the keywords used below are understood by `schema_problems`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RECORD_VERSION = 1
MOST_ELEMENTS = 64
MOST_COUNT = 100_000

# Closed list, so that records of different makers can be compared and drawn.
RELATIONS = (
    "on", "under", "above", "below", "left_of", "right_of", "in_front_of", "behind", "inside", "around", "between",
    "holding", "wearing", "next_to", "looking_at", "part_of", "with",
)

NAME = {"type": "string", "minLength": 1, "maxLength": 200}
PHRASE = {"type": "string", "maxLength": 1000}
PHRASES = {"type": "array", "maxItems": 64, "items": NAME}

ELEMENT = {
    "type": "object", "additionalProperties": False, "required": ["id", "name"],
    "properties": {
        "id": {"type": "string", "minLength": 1, "maxLength": 20}, "name": NAME,
        "count": {"type": "integer", "minimum": 1, "maximum": MOST_COUNT}, "attributes": PHRASES,
    },
}
RELATION = {
    "type": "object", "additionalProperties": False, "required": ["a", "relation", "b"],
    "properties": {"a": NAME, "relation": {"type": "string", "enum": list(RELATIONS)}, "b": NAME},
}

# What a captioner or a chat model is asked for; the whole record adds who made it and whether it may be used.
THOUGHT_PROPERTIES: dict[str, Any] = {
    "elements": {"type": "array", "maxItems": MOST_ELEMENTS, "items": ELEMENT},
    "relations": {"type": "array", "maxItems": 256, "items": RELATION},
    "composition": PHRASE, "environment": PHRASE, "lighting": PHRASE,
    "palette": PHRASES, "style": PHRASES,
    "text": {"type": "array", "maxItems": 32, "items": {"type": "string", "minLength": 1, "maxLength": 500}},
    "details": PHRASES,
    "enhanced": {"type": "string", "minLength": 1, "maxLength": 10_000},
}
THOUGHT_SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "properties": THOUGHT_PROPERTIES,
    "required": ["elements", "relations", "composition", "environment", "lighting", "palette", "style", "text", "details", "enhanced"],
}
RECORD_SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": False,
    "required": ["v", "prompt", "language", "elements", "relations", "style", "text", "trace", "enhanced", "ok"],
    "properties": THOUGHT_PROPERTIES | {
        "v": {"type": "integer", "minimum": RECORD_VERSION, "maximum": RECORD_VERSION},
        "prompt": {"type": "string", "maxLength": 10_000}, "language": {"type": "string", "enum": ["en", "zh"]},
        "trigger": {"type": ["string", "null"], "maxLength": 200},
        "enhanced": {"type": "string", "maxLength": 10_000},
        "trace": {"type": "string", "maxLength": 20_000}, "ok": {"type": "boolean"},
        "reason": {"type": "string", "maxLength": 2000}, "backend": {"type": "string", "maxLength": 100},
        "model": {"type": ["string", "null"], "maxLength": 300},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, "raw": {"type": "string", "maxLength": 100_000},
    },
}

TYPES: dict[str, Any] = {"string": str, "object": Mapping, "array": (list, tuple), "boolean": bool, "integer": int, "null": type(None)}


def _has_type(value: Any, names: str | list[str]) -> bool:
    names = [names] if isinstance(names, str) else names
    # bool is a subclass of int in Python, not in JSON.
    return any(isinstance(value, TYPES[name]) and not (isinstance(value, bool) and name != "boolean") for name in names)


def schema_problems(value: Any, schema: Mapping[str, Any], where: str = "record") -> Iterator[str]:
    """Every way in which `value` (plain JSON data) breaks `schema`, each with its place; nothing when it fits."""
    if not _has_type(value, schema["type"]):
        yield f"{where} must be {schema['type']}, is {type(value).__name__}"
        return
    yield from _value_problems(value, schema, where)
    if isinstance(value, Mapping):
        yield from _object_problems(value, schema, where)
    if isinstance(value, (list, tuple)):
        if len(value) > schema["maxItems"]:
            yield f"{where} has {len(value)} entries, at most {schema['maxItems']} are allowed"
        for index, entry in enumerate(value[: schema["maxItems"]]):
            yield from schema_problems(entry, schema["items"], f"{where}[{index}]")


def _value_problems(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    if isinstance(value, str):
        if len(value) > schema.get("maxLength", len(value)):
            yield f"{where} has {len(value)} characters, at most {schema['maxLength']} are allowed"
        if len(value.strip()) < schema.get("minLength", 0):
            yield f"{where} is empty"
        if "enum" in schema and value not in schema["enum"]:
            yield f"{where} is {value[:40]!r}, not one of {', '.join(schema['enum'])}"
    if isinstance(value, int) and not isinstance(value, bool) and not schema["minimum"] <= value <= schema["maximum"]:
        yield f"{where} is {value}, outside {schema['minimum']}..{schema['maximum']}"


def _object_problems(value: Mapping, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    properties = schema["properties"]
    for key in schema["required"]:
        if key not in value:
            yield f"{where} lacks `{key}`"
    for key, entry in value.items():
        if key in properties:
            yield from schema_problems(entry, properties[key], f"{where}.{key}" if where != "record" else str(key))
        else:
            yield f"{where} has the unknown key {str(key)[:40]!r}"
