"""The README of a published adapter. The header is made by huggingface_hub, never by hand; every text of a user or of a
file is escaped, so that a caption cannot become markup, YAML or a link."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.adapters.kinds import KINDS
from finetune.adapters.licensing import LICENCE_FILE, NOTICE_FILE, LicencePlan
from finetune.adapters.loading_snippets import SnippetFacts, loading_snippet

TAGS = ("text-to-image", "diffusers", "lora", "template:diffusion-lora")
LONGEST_CAPTION = 1000
PROVEN = (", trained with Brushwork and proven to load: every tensor found its place in a fresh copy of the base, the output changed, "
          "and baking it into the weights gave the same result.")


@dataclass(frozen=True)
class GalleryPicture:
    """name: its path in the repository.  prompt: what it was drawn from."""

    name: str
    prompt: str


@dataclass(frozen=True)
class CardFacts:
    """What the card says.

    base: Hub id of the base, or None when it is not on the Hub.  base_name: what people call the base.
    kind: key of `adapters.kinds.KINDS`.  training: label -> value, shown as a table.  left_out: reason -> number of pictures that were not used.
    sheet: path of the before-and-after picture in the repository, or None.
    evaluation: rows of an evaluation as dicts (measure, value, delta, low, high, better, verdict).
    evaluation_notes: what to keep in mind about them.  limits: sentences.
    proven: whether the file was loaded back and compared (`verify`), as every run ends.
    """

    title: str
    base: str | None
    base_name: str
    base_revision: str | None
    family: str
    licence: LicencePlan
    trigger: str | None
    snippet: SnippetFacts
    gallery: Sequence[GalleryPicture] = ()
    sheet: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    evaluation: Sequence[Mapping[str, Any]] = ()
    evaluation_notes: Sequence[str] = ()
    limits: Sequence[str] = ()
    proven: bool = False
    kind: str = "lora"


def plain(text: Any) -> str:
    """A text as it may stand in the YAML header: one line, no control or direction characters."""
    clean = "".join(" " if unicodedata.category(character) in ("Cc", "Zl", "Zp") else character
                    for character in str(text) if unicodedata.category(character) not in ("Cf", "Cs", "Co"))
    return " ".join(clean.split())[:LONGEST_CAPTION]


MARKUP = str.maketrans({character: f"&#{ord(character)};" for character in "\\`*_[]<>&|~#"})


def escaped(text: Any) -> str:
    """A text as it may stand in the body: no markup of HTML or Markdown, no links, no table cells."""
    return plain(text).translate(MARKUP).replace("://", "&#58;//").replace("www.", "www&#46;")


def code(text: Any) -> str:
    """A text as inline code; backticks inside become apostrophes, since nothing can escape them there."""
    return f"`{plain(text).replace('`', chr(39)) or ' '}`"


def card_data(facts: CardFacts) -> Any:
    """The header as huggingface_hub's own type, which also checks it."""
    from huggingface_hub import ModelCardData

    licence = facts.licence
    custom = {"license_name": licence.name, "license_link": licence.link} if licence.identifier == "other" else {}
    if licence.needs_copy and custom:
        custom["license_link"] = LICENCE_FILE
    more: dict[str, Any] = {}
    if facts.base:
        more["base_model_relation"] = "adapter"
    if facts.trigger:
        more["instance_prompt"] = plain(facts.trigger)
    if facts.gallery:
        more["widget"] = [{"text": plain(picture.prompt), "output": {"url": picture.name}} for picture in facts.gallery]
    return ModelCardData(base_model=facts.base, library_name="diffusers", license=licence.identifier, pipeline_tag="text-to-image",
                         tags=[*TAGS, *([facts.kind] if facts.kind != "lora" else []), plain(facts.family)], **custom, **more)


def render_card(facts: CardFacts) -> str:
    """The whole README. Raises ValueError when huggingface_hub finds the header wrong."""
    from huggingface_hub import ModelCard

    sections = [
        f"# {escaped(facts.title)}",
        f"A {KINDS[facts.kind].title} for {_base(facts)}{PROVEN if facts.proven else '.'}",
        _licence_note(facts), _gallery(facts), _trigger(facts), _usage(facts), _training(facts), _evaluation(facts), _limits(facts), _licence(facts),
    ]
    text = f"---\n{card_data(facts).to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    ModelCard(text)
    return text


def _base(facts: CardFacts) -> str:
    if facts.base:
        revision = f" (revision {code(facts.base_revision)})" if facts.base_revision else ""
        return f"[{escaped(facts.base)}](https://huggingface.co/{facts.base}){revision}"
    return escaped(facts.base_name)


def _licence_note(facts: CardFacts) -> str:
    if not facts.licence.territory:
        return ""
    return f"> **The base's licence does not apply in: {escaped(facts.licence.territory)}.** Whoever is there has no licence to use this adapter or its pictures. The weights are modified: they are an adapter derived from the base."


def _gallery(facts: CardFacts) -> str:
    parts = ["<Gallery />"] if facts.gallery else []
    if facts.sheet:
        parts.append(f"Before (base) and after (with the adapter), same prompts and seeds:\n\n![before and after]({facts.sheet})")
    return "\n\n".join(parts)


def _trigger(facts: CardFacts) -> str:
    return f"## Trigger\n\nPut {code(facts.trigger)} into the prompt." if facts.trigger else ""


def _usage(facts: CardFacts) -> str:
    how = "diffusers has no loader for this kind of adapter; peft loads it into the transformer." if facts.snippet.folder else {
        "pipeline": "The pipeline loads it itself.",
        "transformer": "The pipeline has no loader for adapters, its transformer has.",
        "peft": "diffusers has no LoRA loader for this pipeline; with peft it takes ten lines.",
    }[facts.snippet.loader]
    where = "" if facts.base else " The base is a folder in a clone of Brushwork's repository."
    return (f"## Use it\n\n{how} Nothing of Brushwork is needed.{where}\n\n```python\n{loading_snippet(facts.snippet)}```\n\n"
            f"With Brushwork: `brushwork generate --adapter {facts.snippet.file} --prompt \"...\"`.")


def _training(facts: CardFacts) -> str:
    if not facts.training:
        return ""
    rows = "\n".join(f"| {escaped(label)} | {escaped(value)} |" for label, value in facts.training.items() if value not in (None, ""))
    table = f"## Training\n\n| | |\n|---|---|\n{rows}"
    if not facts.proven:
        return table
    left = sum(facts.left_out.values())
    reasons = "".join(f"\n- {count}: {escaped(reason)}" for reason, count in facts.left_out.items())
    return f"{table}\n\n" + (f"Left out of the data: {left} pictures.{reasons}" if left else "No picture of the data was left out.")


def _evaluation(facts: CardFacts) -> str:
    if not facts.evaluation:
        return ""
    rows = [f"| {escaped(row.get('measure', ''))} | {_number(row.get('value'))} | {_number(row.get('delta'))} | {_interval(row)} | {escaped(row.get('verdict') or '')} |"
            for row in facts.evaluation]
    notes = "".join(f"\n\n{escaped(note)}" for note in facts.evaluation_notes if note)
    return "## Evaluation\n\n| measure | value | against the base | interval | |\n|---|---|---|---|---|\n" + "\n".join(rows) + notes


def _interval(row: Mapping[str, Any]) -> str:
    """The ends, or why there are none."""
    return f"{_number(row.get('low'))} to {_number(row.get('high'))}" if row.get("low") is not None else escaped(row.get("no_interval") or "-")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else "-"


def _limits(facts: CardFacts) -> str:
    return "## Limits\n\n" + "\n".join(f"- {escaped(limit)}" for limit in facts.limits) if facts.limits else ""


def _licence(facts: CardFacts) -> str:
    licence = facts.licence
    text = f" ([{LICENCE_FILE}]({LICENCE_FILE}))" if licence.own_text else ""
    lines = [f"## Licence\n\n{escaped(licence.name or licence.identifier)}{text}."]
    if licence.needs_copy:
        lines.append(f"The adapter is a derivative of the base, whose agreement ([{LICENCE_FILE}]({LICENCE_FILE})) and notice ([{NOTICE_FILE}]({NOTICE_FILE})) come with it "
                     "and whose terms of use hold for it. This repository has no connection with the makers of the base.")
    elif licence.base_name and licence.base_name != licence.name:
        lines.append(f"The base itself is under {escaped(licence.base_name)}.")
    return "\n\n".join(lines)
