"""From folders to what is trained: every picture with its buckets and its captions, and a list of what is left out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.buckets import Placement
from data_tools.images import read_bytes
from data_tools.progress import Progress
from data_tools.records import ImageRecord, shown_name
from data_tools.resolutions import place_at_each
from data_tools.scan import LeftOut
from data_tools.thinking import caption_to_train
from finetune.errors import DataError
from finetune.families.picture_limits import NO_LIMITS, check_size
from finetune.families.protocol import FamilyFacts, PictureGeometry, PictureLimits
from finetune.recipe import Recipe
from finetune.training.caption_choice import CaptionChoice, caption_choice, with_trigger
from finetune.training.data_sources import NAMED_IN_A_MESSAGE, FolderScans, FoundPictures, SourcePicture, find_pictures, folder_rows
from finetune.training.encoding_cache import key_of
from finetune.training.held_out import split_records


@dataclass(frozen=True)
class TrainingPicture:
    """A picture as it is fitted to one bucket, and the sizes that some models are told; a picture that is trained at
    several resolutions is there once for each.

    repeats: times it is seen in an epoch.  weight: factor on its loss.  regularisation: shows what the base knows already.
    mask_hash: SHA-256 of its mask's bytes where the mask weighs the loss, else None.
    """

    record: ImageRecord
    placement: Placement
    repeats: int = 1
    weight: float = 1.0
    regularisation: bool = False
    mask_hash: str | None = None

    @property
    def geometry(self) -> PictureGeometry:
        bucket = self.placement.bucket
        return PictureGeometry((self.record.height, self.record.width), (bucket.height, bucket.width), tuple(self.placement.crop))


@dataclass(frozen=True)
class TrainingSet:
    """What is trained: own pictures first, then regularisation pictures; and what is held out, at the sizes that are trained.
    `data_hash` changes with any picture, fit, caption, weight or mask.  folders: where the trained pictures are from, as plain values."""

    pictures: tuple[TrainingPicture, ...]
    captions: CaptionChoice
    left_out: tuple[LeftOut, ...]
    layout: str
    warnings: tuple[str, ...]
    data_hash: str
    folders: tuple[dict[str, Any], ...] = ()
    held_out: tuple[TrainingPicture, ...] = ()
    held_out_captions: tuple[str, ...] = ()

    def with_held_out(self, dropout: float | None = None) -> TrainingSet:
        """The trained pictures and, numbered on, the held-out ones, each with its one caption. dropout: another one for captions."""
        variants = (*self.captions.variants, *((caption,) for caption in self.held_out_captions))
        captions = replace(self.captions, variants=variants, dropout=self.captions.dropout if dropout is None else dropout)
        return replace(self, pictures=self.pictures + self.held_out, captions=captions)

    def own(self) -> list[TrainingPicture]:
        """Each picture that is to be learned once, as it is fitted at its largest resolution; no regularisation pictures."""
        first: dict[Path, TrainingPicture] = {}
        for picture in self.pictures:
            if not picture.regularisation:
                first.setdefault(picture.record.path, picture)
        return list(first.values())

    def held_out_paths(self) -> list[Path]:
        """Each held-out picture once, however many sizes it is looked at in."""
        return list(dict.fromkeys(picture.record.path for picture in self.held_out))

    def masked(self) -> int:
        """How many pictures have a mask that weighs their loss."""
        return len({picture.record.path for picture in self.pictures if picture.mask_hash})

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Bucket such as "512x768" -> how many own and how many regularisation pictures are trained at it."""
        found: dict[str, tuple[int, int]] = {}
        for picture in self.pictures:
            own, others = found.get(str(picture.placement.bucket), (0, 0))
            found[str(picture.placement.bucket)] = (own, others + 1) if picture.regularisation else (own + 1, others)
        return found


def _captions_of(record: ImageRecord, thinking: str) -> list[str]:
    plain = [caption.text for caption in record.captions if caption.kind == "plain"]
    traces = [words for caption in record.captions if caption.kind == "thinking" and (words := caption_to_train(caption.text))]
    return {"plain": plain, "trace": traces or plain, "mixed": plain + traces}[thinking]


def _filled(record: ImageRecord, policy: str) -> list[str]:
    """Captions for a picture that has none. The trigger is put in front of every caption later on."""
    return [record.path.stem.replace("_", " ").replace("-", " ")] if policy == "file_name" else [""]


def _name_and_reason(record: ImageRecord) -> str:
    """A picture without a caption; in brackets what is wrong with the caption file that it has."""
    reason = next((text for text in record.warnings if text.startswith("caption file")), None)
    return shown_name(record.path.name) + (f" ({reason})" if reason else "")


def _all_captions(found: Sequence[SourcePicture], recipe: Recipe) -> list[list[str]]:
    captions = [_captions_of(picture.record, recipe.data.thinking) for picture in found]
    bare = [picture for picture, own in zip(found, captions, strict=True) if not own]
    policy = recipe.data.missing_caption
    if bare and policy == "error":
        names = ", ".join(_name_and_reason(picture.record) for picture in bare[:NAMED_IN_A_MESSAGE]) + (" ..." if len(bare) > NAMED_IN_A_MESSAGE else "")
        raise DataError(
            f"{len(bare)} of {len(found)} pictures have no caption: {names}", where=str(bare[0].folder),
            fix="run `brushwork data caption` on the folder, or set data.missing_caption to file_name, trigger or empty",
        )
    if bare and policy == "trigger" and not recipe.data.trigger:
        raise DataError("missing_caption is trigger, but there is no trigger", where="data.trigger", fix='add --trigger "a word"')
    return [own or _filled(picture.record, policy) for picture, own in zip(found, captions, strict=True)]


def resolutions_of(recipe: Recipe, facts: FamilyFacts) -> tuple[int, ...]:
    """Edges in pixels at which pictures are trained. Raises DataError for one that the family cannot have."""
    wanted = recipe.data.resolution
    found = wanted if isinstance(wanted, tuple) else (wanted or facts.resolution,)
    if min(found) < facts.size_multiple:
        raise DataError(f"{min(found)} pixels are less than the smallest picture of this base, {facts.size_multiple}", where="data.resolution", fix="choose a larger one")
    return found


def _views(found: SourcePicture, placements: Sequence[Placement], masked: bool) -> list[TrainingPicture]:
    mask = found.record.mask if masked else None
    mask_hash = hashlib.sha256(read_bytes(mask)).hexdigest() if mask is not None else None
    return [TrainingPicture(found.record, placement, found.repeats, found.weight, found.regularisation, mask_hash) for placement in placements]


def _mask_described(picture: TrainingPicture) -> list[str] | None:
    """With what is made of it: runs begun when masks were averaged down had other data."""
    return [picture.mask_hash, "least of each place"] if picture.mask_hash else None


def _described(picture: TrainingPicture, variants: Sequence[str]) -> list[Any]:
    """What of a picture shapes the adapter. What is as usual is not mentioned: runs of earlier versions keep their hash."""
    unusual = [picture.weight, picture.regularisation, _mask_described(picture)]
    always = [picture.record.content_hash, picture.repeats, asdict(picture.placement), list(variants)]
    return always if unusual == [1.0, False, None] else always + unusual


def _described_held_out(picture: TrainingPicture, caption: str) -> list[Any]:
    """The same of a picture that is only measured, which shapes the adapter too: it says which step is the best."""
    always = [picture.record.content_hash, asdict(picture.placement), caption]
    counts = [] if (picture.repeats, picture.weight) == (1, 1.0) else [picture.repeats, picture.weight]
    return [*always, *([_mask_described(picture)] if picture.mask_hash else []), *counts]


def _placed(trained: Sequence[SourcePicture], held_out: Sequence[SourcePicture], recipe: Recipe, facts: FamilyFacts, limits: PictureLimits) -> list[list[Placement]]:
    """Of the trained pictures and, after them, the held-out ones. Raises BadInput for a size that the base cannot be given."""
    data, resolutions = recipe.data, resolutions_of(recipe, facts)
    check_size(max(resolutions), max(resolutions), limits, "data.resolution")
    placed = place_at_each([picture.record.size for picture in trained], resolutions, multiple=facts.size_multiple, most=data.buckets, upscale=data.upscale, fit=data.fit,
                           others=[picture.record.size for picture in held_out], longest=limits.side)
    for bucket in {placement.bucket for placements in placed for placement in placements}:
        check_size(bucket.height, bucket.width, limits, "data.resolution")
    return placed


@dataclass(frozen=True)
class WordedPictures:
    """found: all pictures, with what is left out of them.  trained, held_out: with the captions of each."""

    found: FoundPictures
    trained: list[SourcePicture]
    captions: list[list[str]]
    held_out: list[SourcePicture]
    held_out_captions: list[list[str]]


def find_and_caption(recipe: Recipe, progress: Progress, scans: FolderScans, drawn: Path | None = None) -> WordedPictures:
    """Scan, hold out, caption: what asks neither the base nor torch. drawn: folder of regularisation pictures that the base drew.

    Raises DataError when nothing usable is left or captions are missing.
    """
    found = find_pictures(recipe, drawn, progress, scans)
    trained, held_out = _held_out(found, recipe, progress, scans)
    return WordedPictures(found, trained, _all_captions(trained, recipe), held_out, _all_captions(held_out, recipe))


def build_training_set(recipe: Recipe, facts: FamilyFacts, progress: Progress, drawn: Path | None = None, limits: PictureLimits = NO_LIMITS,
                       scans: FolderScans | None = None) -> TrainingSet:
    """Scan, hold out, caption, choose buckets, fit. drawn: as in `find_and_caption`.  limits: of the base.  scans: folders that were
    looked at already.

    Raises DataError when nothing usable is left or captions are missing.
    """
    data, worded = recipe.data, find_and_caption(recipe, progress, scans or FolderScans(), drawn)
    found, trained, held_out, captions = worded.found, worded.trained, worded.held_out, worded.captions
    placed = _placed(trained, held_out, recipe, facts, limits)
    untriggered = {number for number, picture in enumerate(trained) if picture.regularisation}
    choice = caption_choice(captions, trigger=data.trigger, untriggered=untriggered, shuffle=data.caption_shuffle, kept_parts=data.keep_tokens,
                            dropout=data.caption_dropout, seed=recipe.training.seed)
    pictures, variants = [], []
    for picture, placements, own in zip(trained, placed[:len(trained)], choice.variants, strict=True):
        views = _views(picture, placements, data.masked_loss)
        pictures += views
        variants += [own] * len(views)
    described = [_described(picture, own) for picture, own in zip(pictures, variants, strict=True)]
    watched, watched_captions = [], []
    for picture, placements, own in zip(held_out, placed[len(trained):], worded.held_out_captions, strict=True):
        views = _views(picture, placements, data.masked_loss)
        watched += views
        watched_captions += [with_trigger(own[0], data.trigger)] * len(views)
    described_too = [_described_held_out(picture, caption) for picture, caption in zip(watched, watched_captions, strict=True)]
    return TrainingSet(tuple(pictures), replace(choice, variants=tuple(variants)), tuple(found.left_out), found.layout, tuple(found.warnings),
                       key_of("data", data.background, described, *([described_too] if watched else [])), tuple(folder_rows(trained)), tuple(watched), tuple(watched_captions))


def _held_out(found: FoundPictures, recipe: Recipe, progress: Progress, scans: FolderScans) -> tuple[list[SourcePicture], list[SourcePicture]]:
    """(trained, held out). A held-out picture counts as it would if it were trained: with the repeats and the weight of the folder
    of data.folder and data.also that it lies in, else once. Regularisation pictures are always trained; what is left out on
    the way is added to `found`."""
    folder = recipe.validation.folder
    extra = scans.of(Path(folder), progress) if folder is not None else None
    if extra is not None and not extra.records:
        raise DataError("there is no usable picture in the folder of held-out pictures", where=str(folder), fix="put pictures into it, or leave out validation.folder")
    own = [picture for picture in found.pictures if not picture.regularisation]
    records, held_out, copies = split_records([picture.record for picture in own], extra.records if extra else (), recipe.validation.share, recipe.training.seed)
    if recipe.validation.patience and not held_out:
        raise DataError("no picture is held out, so that no loss can be waited for", where="validation.patience", fix="set validation.share or validation.folder")
    found.left_out += [*(extra.left_out if extra else ()), *copies]
    found.warnings += extra.warnings if extra else []
    source_of, at = {id(picture.record): picture for picture in own}, {picture.record.path.resolve(): picture for picture in own}
    # A scan of the held-out pictures' own folder may know other captions of them than that of the folder around it.
    extras = {id(record): replace(at[path], record=record) if (path := record.path.resolve()) in at else SourcePicture(record, Path(folder or path.parent), 1, 1.0, False)
              for record in (extra.records if extra else ())}
    trained = [source_of[id(record)] for record in records] + [picture for picture in found.pictures if picture.regularisation]
    return trained, [extras.get(id(record)) or source_of[id(record)] for record in held_out]
