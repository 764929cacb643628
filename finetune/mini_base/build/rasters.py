"""Pictures from vector icons: rasterise with transparency, then lay on a plain ground in one of three sizes."""
from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

# (height, width) of the three training sizes. All cost the transformer about the same: 16, 15 and 15 tokens.
BUCKETS = ((64, 64), (48, 80), (80, 48))
# Edge of the icon in each size. Position and size never vary: with so few tokens, jitter made learning far slower.
ICON_EDGE = {(64, 64): 52, (48, 80): 46, (80, 48): 46}
EDGES = tuple(sorted(set(ICON_EDGE.values())))


def icon_svg(icon_set: dict, name: str) -> str:
    width, height = icon_set.get("width", 16), icon_set.get("height", 16)
    icon = icon_set["icons"][name]
    width, height = icon.get("width", width), icon.get("height", height)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>')


def rasterise(svg: str, edge: int) -> np.ndarray:
    """SVG text to premultiplied RGBA uint8 [edge, edge, 4], drawn at twice the size and averaged."""
    import resvg_py
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=edge * 2, height=edge * 2))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    if picture.size != (edge * 2, edge * 2):
        picture = picture.resize((edge * 2, edge * 2), Image.LANCZOS)
    pixels = np.asarray(picture).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return pixels.reshape(edge, 2, edge, 2, 4).mean((1, 3)).round().astype(np.uint8)


def rasterise_all(packages: Path, icons: list[str]) -> dict[int, np.ndarray]:
    """Every icon at every edge: edge -> uint8 [icons, edge, edge, 4]."""
    icon_set = json.loads((packages / "@iconify-json/noto/icons.json").read_text("utf-8"))
    drawings = [icon_svg(icon_set, name) for name in icons]
    return {edge: np.stack([rasterise(svg, edge) for svg in drawings]) for edge in EDGES}


def corner_of_icon(size: tuple[int, int]) -> tuple[int, int]:
    edge = ICON_EDGE[size]
    return (size[0] - edge) // 2, (size[1] - edge) // 2


def compose(icon: np.ndarray, ground, size: tuple[int, int]) -> np.ndarray:
    """Premultiplied RGBA icon in the middle of a plain ground (RGB in 0..1): float32 [height, width, 3] in 0..1."""
    top, left = corner_of_icon(size)
    edge = icon.shape[0]
    canvas = np.empty((*size, 3), np.float32)
    canvas[:] = ground
    colour, cover = icon[..., :3].astype(np.float32) / 255, icon[..., 3:].astype(np.float32) / 255
    window = canvas[top:top + edge, left:left + edge]
    canvas[top:top + edge, left:left + edge] = colour + (1 - cover) * window
    return canvas


def luminance(picture: np.ndarray) -> np.ndarray:
    return (picture * np.array([0.299, 0.587, 0.114], np.float32)).sum(-1, keepdims=True)
