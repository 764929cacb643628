"""From a folder to what is trained: every picture with its bucket and its captions, and a list of what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_tools.buckets import Placement, assign, choose_buckets
from data_tools.progress import Progress
from data_tools.records import ImageRecord
from data_tools.scan import LeftOut, ScanReport, scan_folder
from data_tools.thinking import caption_to_train
from finetune.errors import DataError
from finetune.families.protocol import FamilyFacts, PictureGeometry
from finetune.recipe import Recipe
from finetune.training.caption_choice import CaptionChoice, caption_choice, with_trigger
from finetune.training.encoding_cache import key_of
from finetune.training.held_out import split_records

NAMED_IN_A_MESSAGE = 5


@dataclass(frozen=True)
class TrainingPicture:
    """A picture, how it is fitted to its bucket, and the sizes that some models are told."""

    record: ImageRecord
    placement: Placement

    @property
    def geometry(self) -> PictureGeometry:
        bucket = self.placement.bucket
        return PictureGeometry((self.record.height, self.record.width), (bucket.height, bucket.width), tuple(self.placement.crop))


@dataclass(frozen=True)
class TrainingSet:
    """What is trained, and what is held out. `data_hash` changes with any picture, fit or caption."""

    pictures: tuple[TrainingPicture, ...]
    captions: CaptionChoice
    left_out: tuple[LeftOut, ...]
    layout: str
    warnings: tuple[str, ...]
    data_hash: str
    held_out: tuple[TrainingPicture, ...] = ()
    held_out_captions: tuple[str, ...] = ()

    def with_held_out(self, dropout: float | None = None) -> TrainingSet:
        """The trained pictures and, numbered on, the held-out ones, each with its one caption. dropout: another one for captions."""
        variants = (*self.captions.variants, *((caption,) for caption in self.held_out_captions))
        captions = replace(self.captions, variants=variants, dropout=self.captions.dropout if dropout is None else dropout)
        return replace(self, pictures=self.pictures + self.held_out, captions=captions)


def _captions_of(record: ImageRecord, thinking: str) -> list[str]:
    plain = [caption.text for caption in record.captions if caption.kind == "plain"]
    traces = [words for caption in record.captions if caption.kind == "thinking" and (words := caption_to_train(caption.text))]
    return {"plain": plain, "trace": traces or plain, "mixed": plain + traces}[thinking]


def _filled(record: ImageRecord, policy: str) -> list[str]:
    """Captions for a picture that has none. The trigger is put in front of every caption later on."""
    return [record.path.stem.replace("_", " ").replace("-", " ")] if policy == "file_name" else [""]


def _all_captions(records: Sequence[ImageRecord], recipe: Recipe) -> list[list[str]]:
    captions = [_captions_of(record, recipe.data.thinking) for record in records]
    bare = [record for record, own in zip(records, captions, strict=True) if not own]
    policy = recipe.data.missing_caption
    if bare and policy == "error":
        names = ", ".join(record.path.name for record in bare[:NAMED_IN_A_MESSAGE]) + (" ..." if len(bare) > NAMED_IN_A_MESSAGE else "")
        raise DataError(
            f"{len(bare)} of {len(records)} pictures have no caption: {names}", where=str(recipe.data.folder),
            fix="run `brushwork data caption` on the folder, or set data.missing_caption to file_name, trigger or empty",
        )
    if bare and policy == "trigger" and not recipe.data.trigger:
        raise DataError("missing_caption is trigger, but there is no trigger", where="data.trigger", fix='add --trigger "a word"')
    return [own or _filled(record, policy) for record, own in zip(records, captions, strict=True)]


def build_training_set(recipe: Recipe, facts: FamilyFacts, progress: Progress) -> TrainingSet:
    """Scan, hold out, choose buckets, fit, caption. Raises DataError when nothing usable is left or captions are missing."""
    if recipe.data.folder is None:
        raise DataError("no picture folder is named", where="data.folder", fix="give a folder on the command line or in the recipe")
    report = scan_folder(Path(recipe.data.folder), progress=progress)
    records = list(report.records)
    if not records:
        reasons = "; ".join(f"{left.path.name}: {left.reason}" for left in report.left_out[:NAMED_IN_A_MESSAGE])
        raise DataError("there is no usable picture in the folder" + (f" ({reasons})" if reasons else ""), where=str(recipe.data.folder),
                        fix="put pictures (PNG, JPEG, WebP, AVIF ...) into it")
    extra = _held_out_folder(recipe.validation.folder, progress) if recipe.validation.folder is not None else None
    records, held_out, copies = split_records(records, extra.records if extra else (), recipe.validation.share, recipe.training.seed)
    if recipe.validation.patience and not held_out:
        raise DataError("no picture is held out, so that no loss can be waited for", where="validation.patience", fix="set validation.share or validation.folder")
    captions = _all_captions(records, recipe)
    sizes = [(record.height, record.width) for record in records]
    buckets = choose_buckets(sizes, resolution=recipe.data.resolution or facts.resolution, multiple=facts.size_multiple,
                             most=recipe.data.buckets, upscale=recipe.data.upscale)
    pictures, watched = (tuple(TrainingPicture(record, assign((record.height, record.width), buckets, upscale=recipe.data.upscale, fit=recipe.data.fit)) for record in some)
                         for some in (records, held_out))
    choice = caption_choice(captions, trigger=recipe.data.trigger, shuffle=recipe.data.caption_shuffle, kept_parts=recipe.data.keep_tokens,
                            dropout=recipe.data.caption_dropout, seed=recipe.training.seed)
    watched_captions = tuple(with_trigger(own[0], recipe.data.trigger) for own in _all_captions(held_out, recipe))
    described = [[picture.record.content_hash, picture.record.repeats, asdict(picture.placement), list(variants)]
                 for picture, variants in zip(pictures, choice.variants, strict=True)]
    described_too = [[picture.record.content_hash, asdict(picture.placement), caption] for picture, caption in zip(watched, watched_captions, strict=True)]
    left_out = (*report.left_out, *(extra.left_out if extra else ()), *copies)
    warnings = (*report.warnings, *(extra.warnings if extra else ()))
    return TrainingSet(pictures, choice, left_out, report.layout, warnings, key_of("data", recipe.data.background, described, *([described_too] if watched else [])),
                       watched, watched_captions)


def _held_out_folder(folder: Path, progress: Progress) -> ScanReport:
    report = scan_folder(folder, progress=progress)
    if not report.records:
        raise DataError("there is no usable picture in the folder of held-out pictures", where=str(folder), fix="put pictures into it, or leave out validation.folder")
    return report
