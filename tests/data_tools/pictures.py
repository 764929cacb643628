"""Small pictures that tests make: shapes from a seed, no two alike."""

from __future__ import annotations

import io
import random
from pathlib import Path

from PIL import Image


def draw(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A picture with shapes that depends on the seed; no two seeds look alike."""
    generator = random.Random(seed)
    image = Image.new("RGB", (8, 8))
    image.putdata([tuple(generator.randrange(256) for _ in range(3)) for _ in range(64)])
    return image.resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, width: int = 48, height: int = 32, seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(width, height, seed).save(path, **options)
    return path


def encoded(format: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or draw(64, 48)).save(buffer, format, **options)
    return buffer.getvalue()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]
