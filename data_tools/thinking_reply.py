"""What a model that thinks first has answered: `<think>..</think><recaption>..</recaption>` and the `<answer>` form.

HunyuanImage-3.0 writes think and recaption, Tencent's PromptEnhancer think and answer. Anything that is not one of
these in good order gives a Reply without a prompt and with the reason; nothing here raises on any input.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

LONGEST_REPLY = 100_000
TAG = re.compile(r"<(/?)\s*(think|recaption|answer)\s*>", re.IGNORECASE)
FENCE, FENCE_LANGUAGE = "```", re.compile(r"[\w-]*\s*")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u2028\u2029\ufeff]")


@dataclass(frozen=True)
class Reply:
    """think: the reasoning, "" if none.  prompt: the rewritten prompt, None if there is none to use; `reason` says why."""

    think: str = ""
    prompt: str | None = None
    reason: str = ""


def _clean(text: str) -> str:
    text = CONTROL.sub(" ", text).strip()
    if len(text) < 2 * len(FENCE) or not (text.startswith(FENCE) and text.endswith(FENCE)):
        return text
    inside = text.removeprefix(FENCE).removesuffix(FENCE)
    first, newline, rest = inside.partition("\n")
    return (rest if newline and FENCE_LANGUAGE.fullmatch(first) else inside).strip()


def _blocks(text: str) -> list[tuple[str, str]] | str:
    """(tag, content) in order, "" for text outside of tags; or the reason why the tags are not in order."""
    blocks: list[tuple[str, str]] = []
    inside, start = "", 0
    for match in TAG.finditer(text):
        closes, name, before = match.group(1) == "/", match.group(2).lower(), text[start : match.start()]
        if closes and not inside and name == "think" and not any(tag for tag, _ in blocks):
            # Chat templates of reasoning models write the opening tag themselves; the reply begins inside of it.
            blocks.append(("think", before))
        elif closes and inside == name:
            blocks.append((inside, before))
            inside = ""
        elif not closes and not inside:
            blocks.append(("", before))
            inside = name
        else:
            return f"the tag {match.group(0)} stands where it does not belong"
        start = match.end()
    if inside:
        return f"<{inside}> is never closed, so the answer was cut off"
    return [*blocks, ("", text[start:])]


def parse_reply(text: str) -> Reply:
    """The reasoning and the rewritten prompt of a model's answer; with several blocks the last one counts.

    Accepted: think + recaption, think + answer, think + bare text, recaption or answer alone, bare text. Unbalanced,
    nested, empty or oversized answers give `prompt` None.
    """
    if len(text) > LONGEST_REPLY:
        return Reply(reason=f"the answer has {len(text)} characters, at most {LONGEST_REPLY} are read")
    blocks = _blocks(_clean(text))
    if isinstance(blocks, str):
        return Reply(reason=blocks)
    think = "\n".join(content.strip() for tag, content in blocks if tag == "think").strip()
    answers = [content for tag, content in blocks if tag in ("recaption", "answer")]
    bare = " ".join(content.strip() for tag, content in blocks if not tag).strip()
    prompt = _clean(answers[-1] if answers else bare)
    if not prompt:
        return Reply(think=think, reason="the answer holds no prompt")
    return Reply(think=think, prompt=prompt)


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, or None. Trailing commas, which models like, are forgiven once."""
    start = text.find("{")
    if start < 0:
        return None
    for candidate in (text[start:], re.sub(r",(\s*[}\]])", r"\1", text[start:])):
        try:
            value, _ = json.JSONDecoder().raw_decode(candidate)
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


THINK_MARK = re.compile(r"\s*<\s*/?\s*(?:think|recaption|answer)\s*/?\s*>\s*", re.IGNORECASE)


def asks_to_think(prompt: str) -> tuple[bool, str]:
    """(whether the prompt carries the mark `<think>`, the prompt without reply tags)."""
    marked = re.search(r"<\s*think\s*/?\s*>", prompt, re.IGNORECASE) is not None
    return marked, THINK_MARK.sub(" ", prompt).strip()
