"""What worker processes do: open a picture and fit it to its bucket. No torch here, so that workers start fast."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.buckets import Placement
from data_tools.errors import DataError
from data_tools.images import BadPicture, apply_placement, decode, read_bytes, to_array
from data_tools.records import shown_name


def load_pixels(path: Path, placement: Placement, background: str, content_hash: str | None = None) -> np.ndarray:
    """(H, W, 3) uint8 sRGB of the bucket's size. content_hash: SHA-256 of the bytes that were checked, under which the result will be known.

    Raises DataError when the picture cannot be opened any more or has other bytes now."""
    return to_array(_fitted(path, placement, background, content_hash))


def load_mask(path: Path, placement: Placement, content_hash: str | None = None) -> np.ndarray:
    """(H, W) uint8 of the bucket's size, cut as its picture is; 255 is learned fully. What is transparent, and the border of
    a picture that does not fill its bucket, is black. content_hash and errors as in `load_pixels`."""
    return np.array(_fitted(path, placement, "#000000", content_hash).convert("L"), dtype=np.uint8)


def _fitted(path: Path, placement: Placement, background: str, content_hash: str | None) -> Image.Image:
    try:
        content = read_bytes(path)
    except BadPicture as gone:
        raise DataError(f"cannot be read any more: {gone.what}", where=gone.where, fix="start again once the folder is left alone") from None
    if content_hash is not None and hashlib.sha256(content).hexdigest() != content_hash:
        raise DataError("the file was changed while the run prepared its pictures", where=shown_name(path), fix="start again once the folder is left alone")
    return apply_placement(decode(content, shown_name(path), background=background)[0], placement, background=background)
