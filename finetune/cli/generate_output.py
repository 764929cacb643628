"""What `generate` leaves behind: pictures with their settings, labelled sheets, thinking records, JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.generate_arguments import NamedAdapter

if TYPE_CHECKING:
    from PIL.Image import Image

    from data_tools.thinking import ThinkingRecord
    from finetune.families.base_models import BaseModel
    from finetune.generation import DrawnPicture


@dataclass(frozen=True)
class Kept:
    """A picture that is written. score: of the reward, or None without one."""

    drawn: DrawnPicture
    score: float | None = None
    thinking: ThinkingRecord | None = None
    path: Path | None = None


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make the folder, which must be possible before anything is drawn; a new one in which nothing was left is taken away again when the
    block fails."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def save_kept(kept: Kept, base: BaseModel, adapters: Sequence[NamedAdapter], out: Path) -> Kept:
    """Write the PNG with the settings in its text chunk, under a name that is free, and the thinking record beside it."""
    from finetune import __version__
    from finetune.sampling import save_picture
    from finetune.thinking.picture import settings_with_record, store_beside

    request, weights = kept.drawn.request, kept.drawn.weights
    strengths = "".join(f"-{words_of(adapter.label)}-{weights[adapter.name]:g}" for adapter in adapters if len(adapter.weights) > 1)
    path = free_name(out, f"{words_of(kept.drawn.asked)}-seed-{request.seed}{strengths}")
    settings: dict[str, Any] = vars(request) | {
        "base": base.identifier, "revision": base.revision, "family": base.family.facts.name,
        "adapters": [data | {"sha256": _identity(adapter.path)} for data, adapter in zip(adapter_data(weights, adapters), adapters, strict=True)], "score": kept.score, "brushwork": __version__,
    }
    if kept.thinking is not None:
        settings = settings_with_record(settings, kept.thinking)
    save_picture(kept.drawn.image, path, settings)
    if kept.thinking is not None:
        store_beside(path, kept.thinking)
    return replace(kept, path=path)


def as_data(kept: Kept, adapters: Sequence[NamedAdapter]) -> dict[str, Any]:
    """One entry of `pictures`."""
    from finetune.thinking.picture import shown_record

    drawn = kept.drawn
    data = {"path": kept.path, "prompt": drawn.asked, "seed": drawn.request.seed, "adapters": adapter_data(drawn.weights, adapters), "score": kept.score}
    if kept.thinking is not None:
        data["thinking"] = shown_record(kept.thinking)
    return data


def adapter_data(weights: Mapping[str, float], adapters: Sequence[NamedAdapter]) -> list[dict[str, Any]]:
    """The adapters of a picture with their strengths."""
    return [{"path": str(adapter.path), "weight": weights[adapter.name]} for adapter in adapters]


@cache
def _identity(path: Path) -> str:
    """Read once for all pictures: paths change, and a picture must name what it was drawn with."""
    from finetune.adapters.strict_reading import identity_of

    return identity_of(path)


def words_of(text: str) -> str:
    """The beginning of a text as a file name."""
    words = "".join(character if character.isalnum() else "-" for character in text[:40])
    return "-".join(part for part in words.split("-") if part) or "picture"


def free_name(folder: Path, stem: str) -> Path:
    """folder/stem.png, or the first stem-2.png, stem-3.png ... that is not there."""
    names = itertools.chain([f"{stem}.png"], (f"{stem}-{number}.png" for number in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def row_name(weights: Mapping[str, float], adapters: Sequence[NamedAdapter]) -> str:
    """The strengths of a row in words."""
    return ", ".join(f"{adapter.label} x {weights[adapter.name]:g}" for adapter in adapters) or "base"


def grid_sheet(pictures: Sequence[DrawnPicture], adapters: Sequence[NamedAdapter], labels: Mapping[int, str] | None = None) -> list[Image]:
    """A block for each prompt, a row for each set of strengths, a column for each seed.

    labels: place in `pictures` -> text under which that picture stands instead of its seed; each row then is a block.
    """
    from finetune.sampling_sheets import contact_sheet

    rows: dict[str, dict[str, list[int]]] = {}
    for place, picture in enumerate(pictures):
        rows.setdefault(picture.asked, {}).setdefault(row_name(picture.weights, adapters), []).append(place)
    blocks = []
    for prompt, by_row in rows.items():
        if labels is None:
            seeds = [f"seed {pictures[place].request.seed}" for place in next(iter(by_row.values()))]
            blocks.append(contact_sheet([[pictures[place].image for place in places] for places in by_row.values()], row_names=list(by_row), column_names=seeds, title=prompt))
            continue
        for name, places in by_row.items():
            heads = [labels[place] for place in places]
            blocks.append(contact_sheet([[pictures[place].image for place in places]], row_names=[name], column_names=heads, title=prompt))
    return blocks


def trace_blocks(kept: Sequence[Kept]) -> list[Image]:
    """The first picture of each prompt that was thought about, with its trace beside it."""
    from finetune.thinking.picture import picture_with_trace

    first = {each.drawn.asked: each for each in reversed(kept) if each.thinking is not None}
    return [picture_with_trace(each.drawn.image, each.thinking) for each in reversed(first.values()) if each.thinking is not None]


def save_sheet(blocks: Sequence[Image], out: Path) -> Path:
    """Write the blocks under each other."""
    from data_tools.atomic_files import whole_file
    from finetune.sampling_sheets import stack_sheets

    path = free_name(out, "sheet")
    with whole_file(path) as temporary:
        stack_sheets(blocks).save(temporary, format="PNG")
    return path
