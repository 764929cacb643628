"""A zip of pictures and captions: unpacked member by member, never outside its folder, and read as a picture folder."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path, PurePosixPath

from data_tools.atomic_files import write_bytes
from data_tools.errors import DataError
from data_tools.images import Limits
from data_tools.layouts.picture_folder import is_picture, read_picture_folder
from data_tools.layouts.unpacking import unpacked_folder
from data_tools.progress import Progress
from data_tools.records import LeftOut, Reading, shown_name
from data_tools.result_cache import file_stamp

MOST_RATIO = 200  # a member that shrinks more than this and is large is a bomb
BOMB_BYTES = 64 * 2**20
MOST_MEMBERS = 1_000_000
UTF8_NAMES = 0x800  # bit of a member's flags
ENCRYPTED = 0x1


def read_zip(path: Path, progress: Progress = Progress(), limits: Limits = Limits()) -> Reading:
    """Read a zip. Members that are links, encrypted, broken, too large or named outside the archive are left out and listed."""
    refused: list[LeftOut] = []
    folder = unpacked_folder(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            if len(members) > MOST_MEMBERS:
                raise DataError(f"{len(members):,} members, more than {MOST_MEMBERS:,}", where=shown_name(path))
            if not _unpacked_already(folder, path):
                _unpack(archive, members, folder, path, refused, progress, limits)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise DataError(f"not a readable zip archive: {error}", where=shown_name(path)) from None
    reading = read_picture_folder(folder)
    reading.entries = [replace(entry, layout="zip") for entry in reading.entries]
    reading.left_out += refused
    reading.notes[0] = f"layout: zip archive; inside it {reading.notes[0].removeprefix('layout: ')}"
    reading.layout = "zip"
    return reading


def _unpacked_already(folder: Path, path: Path) -> bool:
    stamp = file_stamp(path)
    try:
        return bool(stamp) and (folder / ".source").read_text() == stamp
    except OSError:
        return False


def _unpack(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path, path: Path, refused: list[LeftOut], progress: Progress, limits: Limits) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(member.file_size for member in members)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"unpacked it would take {needed:,} bytes, {free:,} are free", where=shown_name(path), fix="set BRUSHWORK_CACHE to a folder on a larger disk")
    with progress.phase("unpacking", len(members)) as advance:
        for member in members:
            name = _name(member)
            try:
                _unpack_member(archive, member, name, folder, limits)
            except DataError as error:
                if is_picture(Path(name)) or member.flag_bits & ENCRYPTED:
                    refused.append(LeftOut(path / shown_name(name), error.what, getattr(error, "code", "bad_member")))
            advance(1)
    if not refused:  # a later reading must list the refused ones again
        write_bytes(folder / ".source", file_stamp(path).encode())


def _unpack_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, folder: Path, limits: Limits) -> None:
    target = folder / safe_relative(name)
    if stat.S_ISLNK(member.external_attr >> 16):
        raise DataError("a link inside an archive")
    if member.flag_bits & ENCRYPTED:
        raise DataError("encrypted")
    if member.file_size > limits.file_bytes:
        raise DataError(f"{member.file_size:,} bytes, more than the limit of {limits.file_bytes:,}")
    if member.file_size > BOMB_BYTES and member.file_size > MOST_RATIO * max(1, member.compress_size):
        raise DataError("expands beyond all measure")
    if target.exists():
        raise DataError("a second member of this name")
    try:
        with archive.open(member) as opened:
            content = opened.read(limits.file_bytes + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"broken inside the archive: {error}") from None
    if not os.path.basename(name).startswith("."):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _name(member: zipfile.ZipInfo) -> str:
    """Names without the UTF-8 flag are often UTF-8 or GBK all the same, shown as if they were code page 437."""
    if member.flag_bits & UTF8_NAMES:
        return member.filename
    raw = member.filename.encode("cp437", "replace")
    for encoding in ("utf-8", "gbk"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return member.filename


def safe_relative(name: str) -> PurePosixPath:
    """The member's name as a relative path. Raises DataError when it is absolute, climbs, or holds a zero byte."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\x00" in name or not path.parts or ":" in path.parts[0]:
        raise DataError("a name that leads out of the archive")
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in path.parts):
        raise DataError("a name longer than 255 bytes")
    return path
