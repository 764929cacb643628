"""Thinking records for pictures, from whatever a captioner answered: a JSON object, or plain words taken apart by rules."""

from __future__ import annotations

from dataclasses import replace

from data_tools.caption_cleanup import clean_answer
from data_tools.errors import DataError
from data_tools.thinking import ThinkingRecord, from_json
from data_tools.thinking_reply import first_object
from data_tools.thinking_rules import think_by_rules
from data_tools.thinking_schema import THOUGHT_PROPERTIES
from data_tools.thinking_text import trace_text

LONGEST_RAW = 20_000  # characters of the model's own words that a record keeps


def thinking_record(answer: str, language: str, *, trigger: str | None = None, backend: str, model: str | None) -> tuple[ThinkingRecord | None, str]:
    """(record, "") or (None, why not). The record's prompt is the picture in words; its trace is rendered from its fields."""
    data = first_object(answer)
    if data is None:
        cleaned = clean_answer(answer)
        if cleaned.problem:
            return None, cleaned.problem
        record = think_by_rules(cleaned.text, language=language, trigger=trigger)
        if not record.ok:
            return None, record.reason
        return replace(record, backend=f"{backend}+rules", model=model or None, raw=answer[:LONGEST_RAW]), ""
    described = clean_answer(str(data.get("enhanced") or ""))
    if described.problem:
        return None, f"no description in the answer ({described.problem})"
    kept = {key: value for key, value in data.items() if key in THOUGHT_PROPERTIES}
    usual = {"elements": [], "relations": [], "composition": "", "environment": "", "lighting": "", "palette": [], "style": [], "text": [], "details": []}
    whole = usual | kept | {"enhanced": described.text, "v": 1, "prompt": described.text, "language": language, "trigger": trigger or None, "trace": "", "ok": True}
    try:
        record = from_json(whole)
    except DataError as error:
        return None, error.what
    record = replace(record, trace=trace_text(record), backend=backend, model=model or None, raw=answer[:LONGEST_RAW])
    return record, ""
