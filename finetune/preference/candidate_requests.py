"""What candidates are asked for: prompts and adapters, as a user writes them; read before anything heavy is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import BadInput, DataError
from data_tools.near_names import meant_path
from finetune.adapters.strict_reading import identity_of
from finetune.preference.journal import parse_line


@dataclass(frozen=True)
class Prompt:
    """A line of the prompts file."""

    id: str
    text: str
    negative: str = ""


@dataclass(frozen=True)
class AdapterUse:
    """An adapter file at a strength."""

    path: Path
    weight: float = 1.0

    @property
    def sha256(self) -> str:
        """`strict_reading.identity_of` the file or folder."""
        return identity_of(self.path)

    def to_record(self) -> dict[str, Any]:
        """As candidates.jsonl names it."""
        around = [part for part in reversed(self.path.resolve().parts) if part not in ("adapter", "pytorch_lora_weights.safetensors")]
        return {"name": Path(around[0]).stem, "sha256": self.sha256, "weight": self.weight}


def parse_variants(given: Sequence[str]) -> tuple[tuple[AdapterUse, ...], ...]:
    """From FILE[:WEIGHT], several joined by +, or `base` for no adapter; one variant an entry. Raises BadInput."""
    return tuple(_variant(text) for text in given) or ((),)


def _variant(text: str) -> tuple[AdapterUse, ...]:
    if text == "base":
        return ()
    uses = []
    for part in text.split("+"):
        path, _, weight = part.rpartition(":") if ":" in part else (part, "", "1")
        try:
            uses.append(AdapterUse(Path(path), float(weight)))
        except ValueError:
            raise BadInput(f"the weight {weight!r} is not a number", where=f"--adapter {text}", fix="write FILE:0.8") from None
        if not uses[-1].path.exists():
            raise BadInput("there is no such adapter", where=path, fix=meant_path(path, "give an adapter file, or the `adapter` folder of a run"))
    return tuple(uses)


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt a line, or JSON Lines with `prompt` and, where wanted, `prompt_id` and `negative`.

    Raises DataError for a file without prompts, a broken line, or an id that two different prompts share.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix=meant_path(path, "write one prompt a line into a text file")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 text ({type(error).__name__})", where=str(path)) from None
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            prompt = _prompt(line.strip(), f"{path.name}, line {number}")
            if prompts.setdefault(prompt.id, prompt) != prompt:
                raise DataError(f"the prompt id {prompt.id!r} is used for two prompts", where=f"{path.name}, line {number}")
    if not prompts:
        raise DataError("there is no prompt in this file", where=str(path), fix="write one prompt a line")
    return list(prompts.values())


def _prompt(line: str, where: str) -> Prompt:
    if not line.startswith("{"):
        return Prompt(prompt_id(line), line)
    record = parse_line(line, where)
    text, negative, identifier = record.get("prompt"), record.get("negative", ""), record.get("prompt_id")
    if not isinstance(text, str) or not text.strip() or not isinstance(negative, str) or not isinstance(identifier, str | None):
        raise DataError("`prompt` must be text, and `negative` and `prompt_id` too where given", where=where)
    return Prompt(identifier or prompt_id(text), text, negative)


def prompt_id(text: str) -> str:
    """A short name for a prompt, the same everywhere."""
    return "p" + hashlib.sha256(text.encode()).hexdigest()[:12]
