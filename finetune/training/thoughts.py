"""What was thought about the training pictures, for the report: the trace beside the caption that was trained."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from data_tools.records import ImageRecord
from data_tools.thinking import from_json
from finetune.errors import DataError

MOST_SHOWN = 24


def shown_thoughts(records: Iterable[ImageRecord], most: int = MOST_SHOWN) -> list[dict[str, Any]]:
    """Picture, prompt, trace and enhanced caption of the first `most` thinking records; ok and reason as in the record."""
    found: list[dict[str, Any]] = []
    for record in records:
        for caption in record.captions:
            if caption.kind != "thinking" or len(found) >= most:
                continue
            try:
                thought = from_json(json.loads(caption.text))
            except (ValueError, RecursionError, DataError):
                continue
            found.append({"picture": record.path.name, "prompt": thought.prompt, "trace": thought.trace, "enhanced": thought.enhanced, "ok": thought.ok, "reason": thought.reason})
    return found
