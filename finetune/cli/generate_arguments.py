"""Reading what was typed after `generate`: adapters with weights, seeds, sizes; and the settings that were not typed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import BadInput
from data_tools.near_names import meant_path

MOST_PICTURES = 10_000


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter file or folder with the strengths to draw it at. name: for the model, label: for people."""

    name: str
    label: str
    path: Path
    weights: tuple[float, ...]


def parse_adapters(given: Sequence[str]) -> list[NamedAdapter]:
    """FILE, FILE:0.8 or FILE:0,0.5,1. Names come from the paths and are made different."""
    adapters: list[NamedAdapter] = []
    for text in given:
        path, colon, strengths = text.rpartition(":")
        if not colon or not re.fullmatch(r"[-+0-9.eE,]+", strengths):
            path, strengths = text, "1"
        try:
            weights = tuple(float(strength) for strength in strengths.split(","))
        except ValueError:
            raise BadInput("the weights of an adapter are not numbers", where=f"--adapter {text}", fix="write FILE:0.8, or FILE:0,0.5,1 for a row each") from None
        if not Path(path).exists():
            raise BadInput("there is no such adapter", where=f"--adapter {text}", fix=meant_path(path, "give an adapter file, or the `adapter` folder of a run"))
        label = _label(Path(path))
        adapters.append(NamedAdapter(_name(label, [adapter.name for adapter in adapters]), label, Path(path), weights))
    return adapters


def _label(path: Path) -> str:
    """The file's name, or the run's where the file has the name that every adapter has."""
    resolved = path.resolve()
    plain = resolved.stem if resolved.is_file() else resolved.name
    if plain in ("adapter", "pytorch_lora_weights", "adapter_model"):
        around = [part for part in reversed(resolved.parts[:-1]) if part != "adapter"]
        plain = around[0] if around else plain
    return plain


def _name(label: str, taken: Sequence[str]) -> str:
    # The library that attaches takes names of a-z, 0-9, _ and - that begin with a letter and are none of its own, such as "lora".
    plain = "adapter_" + re.sub(r"[^a-z0-9_-]", "_", label.lower())[:40]
    return next(name for name in itertools.chain([plain], (f"{plain}_{number}" for number in itertools.count(2))) if name not in taken)


def weight_sets(adapters: Sequence[NamedAdapter]) -> list[dict[str, float]]:
    """Every combination of the strengths that were asked for; one empty set without adapters."""
    return [dict(zip([adapter.name for adapter in adapters], chosen, strict=True)) for chosen in itertools.product(*(adapter.weights for adapter in adapters))]


def parse_seeds(given: Sequence[str]) -> list[int]:
    """Seeds such as "7", "1,2,3" or "0-7", each once, in order."""
    seeds: list[int] = []
    for part in ",".join(given).split(","):
        found = re.fullmatch(r"\s*(\d{1,18})(?:\s*-\s*(\d{1,18}))?\s*", part)
        if not found:
            raise BadInput("not a seed", where=f"--seed {part}", fix="seeds are whole numbers: 7, 1,2,3 or 0-7")
        first, last = int(found[1]), int(found[2] or found[1])
        if first > last:
            raise BadInput("not a range of seeds", where=f"--seed {part}", fix="write the smaller number first, for example 0-7")
        if last - first >= MOST_PICTURES:
            raise BadInput(f"these are {last - first + 1:,} seeds", where=f"--seed {part}", fix=f"at most {MOST_PICTURES:,} pictures are drawn at once")
        seeds.extend(range(first, last + 1))
    return list(dict.fromkeys(seeds))


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) in pixels from "WIDTHxHEIGHT" or one edge; None when nothing was typed."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,5})\s*(?:[x×]\s*(\d{1,5}))?\s*", text)
    if not found:
        raise BadInput("not a size", where=f"--size {text}", fix="write WIDTHxHEIGHT in pixels, for example 1024x768")
    return int(found[2] or found[1]), int(found[1])
