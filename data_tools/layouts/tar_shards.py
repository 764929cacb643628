"""WebDataset: tar files in which members with the same key, one after the other, are one picture with its captions."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from data_tools.errors import DataError
from data_tools.images import EXTENSIONS, Limits
from data_tools.layouts.archives import safe_relative
from data_tools.layouts.caption_files import caption_of, merge_captions
from data_tools.layouts.unpacking import keep_picture, unpacked_folder
from data_tools.progress import Progress
from data_tools.records import Caption, Entry, LeftOut, Reading, shown_name

CAPTION_FIELDS = ("txt", "caption", "text")
MASK_FIELDS = ("mask.png", "mask.jpg")
LARGEST_FIELD = 2**20  # bytes of a caption or JSON member
READ_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error)


def read_tar_shards(shards: list[Path], progress: Progress = Progress(), limits: Limits = Limits()) -> Reading:
    """Read shards in the order given. Links, devices, climbing names and samples cut by the end of a file are listed."""
    reading = Reading("webdataset")
    reading.notes.append(f"layout: webdataset ({len(shards)} tar file{'s' if len(shards) != 1 else ''})")
    with progress.phase("reading tar files", len(shards)) as advance:
        for shard in shards:
            _read_shard(shard, reading, limits)
            advance(1, shard.name)
    return reading


def _read_shard(shard: Path, reading: Reading, limits: Limits) -> None:
    folder = unpacked_folder(shard)
    before = len(reading.entries) + len(reading.left_out)
    try:
        for key, fields in _samples(shard, reading, limits):
            _add(key, fields, shard, folder, reading)
    except READ_ERRORS as error:
        if len(reading.entries) + len(reading.left_out) == before:
            raise DataError(f"not a readable tar file: {error}", where=shown_name(shard)) from None
        reading.left_out.append(LeftOut(shard / "(the rest)", f"the tar file is cut short or broken: {error}", "truncated"))


def _samples(shard: Path, reading: Reading, limits: Limits) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {field: bytes}) of consecutive members; the key is the path up to the first dot of the last part."""
    key, fields = None, {}
    with tarfile.open(shard, "r|*") as archive:
        for member in archive:
            if member.isdir():
                continue
            member_key, field = _split(member.name)
            reason = _refusal(member, field, limits)
            if reason:
                reading.left_out.append(LeftOut(shard / shown_name(member.name), reason, "bad_member"))
                continue
            if member_key != key and fields:
                yield key, fields
                fields = {}
            key = member_key
            name = field if field not in fields else f"{field}#2"
            fields[name] = archive.extractfile(member).read()
    if fields:
        yield key, fields


def _split(name: str) -> tuple[str, str]:
    folder, _, last = name.rpartition("/")
    stem, _, field = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, field.lower()


def _refusal(member: tarfile.TarInfo, field: str, limits: Limits) -> str | None:
    if not member.isreg():
        return "a link or device inside an archive"
    try:
        safe_relative(member.name)
    except DataError as error:
        return error.what
    most = limits.file_bytes if _is_picture_field(field) else max(LARGEST_FIELD, limits.file_bytes if field not in CAPTION_FIELDS else 0)
    return f"{member.size:,} bytes, more than the limit of {most:,}" if member.size > most else None


def _is_picture_field(field: str) -> bool:
    return f".{field.rsplit('.', 1)[-1]}" in EXTENSIONS


def _add(key: str, fields: dict[str, bytes], shard: Path, folder: Path, reading: Reading) -> None:
    masks = [name for name in MASK_FIELDS if name in fields]
    pictures = [name for name in fields if _is_picture_field(name) and name not in MASK_FIELDS and not name.startswith("cond.")]
    warnings: list[str] = []
    about = _json(fields.get("json"), warnings)
    captions = _captions(fields, about, warnings)
    if not pictures:
        reading.left_out.append(LeftOut(shard / shown_name(key), f"a sample without a picture (fields: {', '.join(sorted(fields))})", "missing"))
        return
    if len(pictures) > 1:
        warnings.append(f"a sample with {len(pictures)} pictures (names with dots?); each is used with the same captions")
    name = str(about.get("source_name") or key)
    mask = keep_picture(folder, f"{key}.mask.png", fields[masks[0]]) if masks else None
    licence = about.get("licence", about.get("license"))
    repeats = about.get("repeats", 1)
    split = about.get("split", "train")
    for field in pictures:
        path = keep_picture(folder, f"{Path(name).stem}.{field.rsplit('.', 1)[-1].removesuffix('#2')}", fields[field])
        reading.entries.append(
            Entry(path, tuple(captions), mask, licence if isinstance(licence, str) else None, "webdataset", repeats if isinstance(repeats, int) and repeats > 0 else 1, split if split in ("train", "held_out", "regularisation") else "train", tuple(warnings))
        )


def _json(content: bytes | None, warnings: list[str]) -> dict:
    if content is None:
        return {}
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        warnings.append("the sample's json is not a JSON object; ignored")
        return {}
    return data


def _captions(fields: dict[str, bytes], about: dict, warnings: list[str]) -> list[Caption]:
    captions: list[Caption] = []
    for field in CAPTION_FIELDS:
        if field not in fields:
            continue
        try:
            merge_captions(captions, caption_of(fields[field].decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            warnings.append(f"its .{field} is not UTF-8 at byte {error.start}")
    merge_captions(captions, caption_of(about.get("caption")))
    merge_captions(captions, caption_of(about.get("captions")))
    return captions
