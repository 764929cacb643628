"""Prompt files of evaluations: JSON lines with ids and splits, or plain text with one prompt a line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.near_names import meant_path
from data_tools.thinking import SURROGATE
from finetune.errors import BadInput

SPLITS = ("style", "unrelated", "holdout")
LARGEST_FILE_BYTES = 20_000_000
SAFE_ID = re.compile(r"[\w.-]{1,80}")


@dataclass(frozen=True)
class EvaluationPrompt:
    """split: "style" (the adapter should act), "unrelated" (it should not; drift is measured there) or "holdout"."""

    prompt_id: str
    prompt: str
    tags: tuple[str, ...] = ()
    split: str = "style"


def prompt_id_of(prompt: str) -> str:
    """A name for a prompt that has none: the same words have the same name in every file."""
    return "p" + hashlib.sha256(prompt.encode()).hexdigest()[:10]


def read_prompts(path: Path | str) -> list[EvaluationPrompt]:
    """From JSON lines {"prompt_id", "prompt", "tags", "split"} (all but prompt optional) or plain lines; # is a comment.

    Raises BadInput naming file and line: unreadable, empty, a repeated id, an unknown split.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise BadInput(f"larger than {LARGEST_FILE_BYTES} bytes", where=str(path), fix="is this a prompt file?")
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadInput("is not UTF-8 text", where=str(path)) from None
    except OSError as error:
        raise BadInput((error.strerror or "cannot be read").lower(), where=str(path), fix=meant_path(path, "give a text file with one prompt a line, or JSON lines")) from None
    found: dict[str, EvaluationPrompt] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        prompt = _from_line(line, f"{path}, line {number}")
        if prompt.prompt_id in found:
            raise BadInput(f"the prompt id {prompt.prompt_id!r} comes twice", where=f"{path}, line {number}", fix="results are kept by prompt id; give each prompt its own")
        found[prompt.prompt_id] = prompt
    if not found:
        raise BadInput("holds no prompts", where=str(path), fix='write one a line, or JSON lines such as {"prompt": "a dog", "split": "style"}')
    return list(found.values())


def _from_line(line: str, where: str) -> EvaluationPrompt:
    if not line.startswith("{"):
        return EvaluationPrompt(prompt_id_of(line), line)
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise BadInput("is not a JSON object", where=where) from None
    prompt, tags = data.get("prompt"), data.get("tags", [])
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInput("has no prompt", where=where)
    if SURROGATE.search(prompt):
        raise BadInput("its prompt holds half of a character (a lone surrogate)", where=where, fix="write the character itself, in UTF-8")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise BadInput("its tags are not a list of words", where=where)
    split = data.get("split", "style")
    if split not in SPLITS:
        raise BadInput(f"the split {split!r} is unknown", where=where, fix=f"one of {', '.join(SPLITS)}")
    prompt_id = str(data.get("prompt_id", prompt_id_of(prompt)))
    if not SAFE_ID.fullmatch(prompt_id) or prompt_id.startswith("."):
        raise BadInput(f"the prompt id {prompt_id[:40]!r} cannot be a file name", where=where, fix="use letters, digits, _ and -")
    return EvaluationPrompt(prompt_id, prompt, tuple(tags), split)


def shortened(prompts: Sequence[EvaluationPrompt], most: int | None) -> list[EvaluationPrompt]:
    """The first `most` prompts of each split, so that a short look keeps all kinds; all of them for None."""
    if most is None:
        return list(prompts)
    return [prompt for index, prompt in enumerate(prompts) if sum(other.split == prompt.split for other in prompts[:index]) < most]
