"""Which pictures are held out: those whose layout says so, those of a folder, or a share drawn by the seed."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.records import ImageRecord, LeftOut
from finetune.errors import DataError
from finetune.randomness import python_random


def hold_out_share(records: Sequence[ImageRecord], share: float, seed: int) -> set[str]:
    """Content hashes of the pictures to hold out: at least one, at most all but one. Copies of a picture go together, and
    names do not count, so that a renamed picture stays where it was. Raises DataError with fewer than two pictures."""
    hashes = sorted({record.content_hash for record in records})
    if len(hashes) < 2:
        raise DataError("one picture cannot be split into trained and held-out ones", where="validation.share", fix="add pictures, or set it to 0")
    python_random(seed, "held-out pictures").shuffle(hashes)
    return set(hashes[:min(len(hashes) - 1, max(1, round(len(hashes) * share)))])


def split_records(records: Sequence[ImageRecord], extra: Sequence[ImageRecord], share: float, seed: int) -> tuple[list[ImageRecord], list[ImageRecord], list[LeftOut]]:
    """(trained, held out, pictures that are not trained because they are copies of held-out ones).

    records: of the data folder; those whose layout says "held_out" are.  extra: of the folder of held-out pictures, which
    may lie inside the data folder.
    """
    named = {record.path.resolve() for record in extra}
    rest = [record for record in records if record.path.resolve() not in named]
    by_layout = [record for record in rest if record.split == "held_out"]
    others = [record for record in rest if record.split != "held_out"]
    drawn = hold_out_share(others, share, seed) if share else set()
    held = [*by_layout, *extra, *(record for record in others if record.content_hash in drawn)]
    hashes = {record.content_hash for record in held}
    trained = [record for record in others if record.content_hash not in hashes]
    copies = [LeftOut(record.path, "the same picture is held out", "held_out") for record in others if record.content_hash in hashes - drawn]
    if held and not trained:
        raise DataError("every picture is held out: nothing is left to train", where="validation", fix="add pictures that are not held out")
    return trained, held, copies
