"""Amounts of memory as people write and read them."""

from __future__ import annotations

from finetune.errors import BadInput

GIB = 1 << 30


def size_text(count: float) -> str:
    """Bytes in the unit in which they can be read."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 2 else f"{count / 2**20:.1f}".removesuffix(".0") + " MiB"


def size_in_bytes(text: str) -> int:
    """"12GB", "512 MiB", "1.5e9" -> bytes; GB is 2^30, as cards are labelled. Raises BadInput."""
    units = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
    body = text.strip().lower().replace("ib", "b")
    digits = body.rstrip("bkmgt ")
    try:
        size = int(float(digits) * units[body[len(digits):].strip()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise BadInput(f"{text!r} is not an amount of memory", where="--fit", fix="write it like 12GB or 800MB")
    return size
