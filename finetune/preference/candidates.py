"""Draw candidates: prompts x seeds x adapters, each with everything needed to make it again; goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.atomic_files import whole_file
from data_tools.errors import BadInput, DataError
from data_tools.images import open_image
from data_tools.progress import Progress

from finetune.adapters.adapter_file import AdapterFile, read_adapter
from finetune.adapters.attach import attach_together, detach
from finetune.adapters.strict_reading import identity_of
from finetune.errors import AdapterError
from finetune.families.key_layouts import KEY_MAPS
from finetune.generation import encode_texts, usual_size
from finetune.preference.candidate_folder import Candidate, CandidateFolder
from finetune.preference.journal import parse_line
from finetune.preference.loaded_base import LoadedBase
from finetune.sampling import PictureRequest, save_picture
from finetune.sampling_sheets import contact_sheet

if TYPE_CHECKING:
    from finetune.thinking.tokens import ThinkingTokens


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
            raise BadInput("there is no such adapter", where=path, fix="give an adapter file, or the `adapter` folder of a run")
    return tuple(uses)


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt a line, or JSON Lines with `prompt` and, where wanted, `prompt_id` and `negative`.

    Raises DataError for a file without prompts, a broken line, or an id that two different prompts share.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError("no such file", where=str(path)) from None
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
