"""Draw candidates: prompts x seeds x adapters, each with everything needed to make it again; goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.atomic_files import whole_file
from data_tools.errors import BadInput
from data_tools.images import open_image
from data_tools.progress import Progress

from finetune.adapters.adapter_file import AdapterFile, read_adapter
from finetune.adapters.attach import attach_together, detach
from finetune.errors import AdapterError
from finetune.families.key_layouts import KEY_MAPS
from finetune.generation import encode_texts, usual_size
from finetune.preference.candidate_folder import Candidate, CandidateFolder
from finetune.preference.candidate_requests import AdapterUse, Prompt
from finetune.preference.loaded_base import LoadedBase
from finetune.sampling import PictureRequest, save_picture
from finetune.sampling_sheets import contact_sheet

if TYPE_CHECKING:
    from finetune.thinking.tokens import ThinkingTokens


@dataclass(frozen=True)
class CandidateSettings:
    """variants: sets of adapters that each draw every prompt and seed; an empty set is the base alone.

    per_prompt: seeds a prompt, from `seed` on.  height, width: pixels, None is the base's usual edge.
    """

    per_prompt: int = 4
    seed: int = 0
    variants: tuple[tuple[AdapterUse, ...], ...] = ((),)
    steps: int = 30
    guidance: float = 5.0
    height: int | None = None
    width: int | None = None
    batch_size: int = 8


@dataclass
class CandidateReport:
    """candidates: all of this call, in order.  drawn: of them, made now; the others were there already."""

    candidates: list[Candidate] = field(default_factory=list)
    drawn: int = 0
    sheets: list[Path] = field(default_factory=list)


def make_candidates(loaded: LoadedBase, prompts: Sequence[Prompt], settings: CandidateSettings, out: Path, progress: Progress | None = None) -> CandidateReport:
    """Draw what `out` does not have yet, write a contact sheet a prompt. Raises BadInput, BaseModelError, AdapterError."""
    progress = progress or Progress()
    if settings.per_prompt < 1:
        raise BadInput(f"{settings.per_prompt} pictures a prompt; at least 1", where="--per-prompt")
    folder, report = CandidateFolder.to_fill(out), CandidateReport()
    files = [[read_adapter(use.path, KEY_MAPS) for use in variant] for variant in settings.variants]
    worn = [[(file, use.weight) for use, file in zip(variant, read, strict=True)] for variant, read in zip(settings.variants, files, strict=True)]
    texts = list(dict.fromkeys(text for prompt in prompts for text in (prompt.text, prompt.negative)))
    encoded = encode_texts(loaded.base, texts, loaded.dtype, loaded.device, worn)
    for number, (variant, read) in enumerate(zip(settings.variants, files, strict=True)):
        loaded.worn, loaded.conditionings = worn[number], encoded[number]
        planned = list(_planned(loaded, prompts, settings, variant))
        report.candidates += [candidate for candidate, _ in planned]
        missing = [(candidate, request) for candidate, request in planned if not _is_there(folder, candidate)]
        if missing:
            _draw(loaded, folder, missing, variant, read, settings.batch_size, progress)
            report.drawn += len(missing)
    report.sheets = [_write_sheet(folder, prompt) for prompt in prompts]
    return report


def _is_there(folder: CandidateFolder, candidate: Candidate) -> bool:
    known = folder.candidates().get(candidate.id)
    return known is not None and (folder.root / known.path).is_file()


def _planned(loaded: LoadedBase, prompts: Sequence[Prompt], settings: CandidateSettings, variant: tuple[AdapterUse, ...]) -> Iterator[tuple[Candidate, PictureRequest]]:
    edge = usual_size(loaded.base)
    height, width = settings.height or edge, settings.width or edge
    adapters = tuple(use.to_record() for use in variant)
    scheduler = loaded.pipeline.scheduler
    for prompt in prompts:
        for number in range(settings.per_prompt):
            request = PictureRequest(prompt.text, settings.seed + number, height, width, settings.steps, settings.guidance, prompt.negative)
            making = {
                "prompt_id": prompt.id, "prompt": prompt.text, "negative": prompt.negative, "seed": request.seed, "base": loaded.base.identifier,
                "revision": loaded.base.revision, "family": loaded.family.facts.name, "adapters": adapters, "steps": request.steps, "guidance": request.guidance,
                "height": height, "width": width, "scheduler": {"class": type(scheduler).__name__, "config": _plain(dict(scheduler.config))},
            }
            identity = "c" + hashlib.sha256(json.dumps(making, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()[:16]
            yield Candidate(id=identity, path=f"pictures/{identity}.png", **making), request


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """What of a scheduler's configuration is JSON."""
    return {key: value for key, value in config.items() if isinstance(value, str | int | float | bool | None) and not key.startswith("_")}


def _draw(loaded: LoadedBase, folder: CandidateFolder, missing: Sequence[tuple[Candidate, PictureRequest]], variant: tuple[AdapterUse, ...], files: Sequence[AdapterFile],
          batch_size: int, progress: Progress) -> None:
    """Batch by batch, so that a kill loses at most one batch. A picture is written before its line."""
    tokens = _attach(loaded, variant, files)
    try:
        with progress.phase("candidates", len(missing)) as advance:
            for start in range(0, len(missing), batch_size):
                batch = missing[start:start + batch_size]
                pictures = loaded.draw([request for _, request in batch], tokens=tokens, batch_size=batch_size)
                for (candidate, _), picture in zip(batch, pictures, strict=True):
                    _store(folder, candidate, picture)
                advance(len(batch))
    finally:
        if variant:
            detach(loaded.transformer)


def _attach(loaded: LoadedBase, variant: tuple[AdapterUse, ...], files: Sequence[AdapterFile]) -> ThinkingTokens | None:
    """Attach the adapters; the thinking tokens that one of them may have. Raises AdapterError where several have some."""
    from finetune.thinking.tokens import tokens_of

    found = [tokens for use, file in zip(variant, files, strict=True) if (tokens := tokens_of(file, use.path, loaded.family.facts.text_stream)) is not None]
    if len(found) > 1:
        raise AdapterError("several adapters of one variant have thinking tokens, which cannot be used together", where="--adapter", fix="join adapters of which at most one has some")
    attach_together(loaded.transformer, {f"variant{number}": (file, use.weight) for number, (use, file) in enumerate(zip(variant, files, strict=True))})
    return found[0] if found else None


def _store(folder: CandidateFolder, candidate: Candidate, picture: Any) -> None:
    path = folder.root / candidate.path
    save_picture(picture, path, candidate.to_record())
    with open(path, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder.add(Candidate(**{**vars(candidate), "image_sha256": digest}))


def _write_sheet(folder: CandidateFolder, prompt: Prompt) -> Path:
    """Every candidate of a prompt, with seed and adapters under each."""
    from finetune.preference.standings import drawn_by

    candidates = folder.by_prompt()[prompt.id]
    pictures = [open_image(folder.picture(candidate)) for candidate in candidates]
    rows = [pictures[start:start + 6] for start in range(0, len(pictures), 6)]
    names = [", ".join(dict.fromkeys(drawn_by(candidate) for candidate in candidates[start:start + 6])) for start in range(0, len(candidates), 6)]
    path = folder.sheets / f"{hashlib.sha256(prompt.id.encode()).hexdigest()[:12]}.png"
    with whole_file(path) as temporary:
        contact_sheet(rows, row_names=names, title=prompt.text).save(temporary, format="PNG")
    return path
