"""The file's own name as its caption: for folders whose names already say what is in the pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from data_tools.captioners import Answer, Request

# What cameras, phones, downloads and generators put into names: it says nothing about the picture.
NOISE = re.compile(
    r"\b(img|image|dsc|dscf|dscn|pxl|photo|picture|screenshot|untitled|copy|final|whatsapp|download)\b|\b[0-9a-f]{16,}\b|\b\d{6,}\b|\b\d+x\d+\b|\(\d+\)",
    re.IGNORECASE,
)


def words_of_name(stem: str) -> str:
    """A stem as words: separators to spaces, camel case apart, numbers at the ends, camera names and repeated words away; may be ""."""
    text = re.sub(r"[_\-.+]+", " ", stem)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    text = NOISE.sub(" ", text)
    text = re.sub(r"(^|\s)\d+(?=\s|$)", " ", text)
    text = re.sub(r"\b(\w+)(\s+\1\b)+", r"\1", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=[^\W\d])\d+$", "", " ".join(text.split()))
    return " ".join(text.split()).strip(" ,")


class FileNameCaptioner:
    """Captions are the words of the file's name; a name without words gives a problem, not an empty caption."""

    name, model, follows_prompts = "file-name", "", False

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            words = words_of_name(request.path.stem)
            yield request, Answer(words, problem="" if words else "its name has no words")
