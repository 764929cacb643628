"""Pictures inside containers (zip, tar, Arrow, Parquet) become files in the cache folder, so that all else sees files.

Files are named by their content: unpacking the same container again writes nothing, and two of them never mix.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from data_tools.atomic_files import write_bytes
from data_tools.result_cache import cache_folder

UNSAFE = re.compile(r"[^\w.\- ]")
LONGEST_NAME = 80
EXTENSION_BY_MAGIC = (
    (b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"II*\x00", ".tif"), (b"MM\x00*", ".tif"), (b"\x00\x00\x00\x0cjP  ", ".jp2"),
)


def unpacked_folder(container: Path) -> Path:
    """Where the pictures of one container go: by its absolute path."""
    return cache_folder() / "unpacked" / hashlib.sha256(os.fsencode(os.path.abspath(container))).hexdigest()[:24]


def safe_name(name: str) -> str:
    """The last part of a member's name with nothing in it that a file system or a terminal minds."""
    last = re.split(r"[/\\]", name)[-1]
    stem, extension = os.path.splitext(UNSAFE.sub("_", last))
    return stem.strip(" .")[:LONGEST_NAME] + extension[:10]


def keep_picture(folder: Path, name: str, content: bytes) -> Path:
    """Write a picture's bytes under a name made of its content and its own name; return the path."""
    path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}-{safe_name(name) or 'picture'}"
    if not path.suffix:
        path = path.with_suffix(extension_of(content))
    if not (path.exists() and path.stat().st_size == len(content)):
        write_bytes(path, content)
    return path


def extension_of(content: bytes) -> str:
    """The usual extension for a picture's bytes; ".img" when they are none that we know."""
    for magic, extension in EXTENSION_BY_MAGIC:
        if content.startswith(magic):
            return extension
    if content[8:12] == b"WEBP":
        return ".webp"
    return ".avif" if content[4:12] in (b"ftypavif", b"ftypavis") else ".img"
