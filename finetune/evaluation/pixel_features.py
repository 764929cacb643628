"""Plain features of pictures, with numpy alone: colours, gradients, thumbnails, perceptual hashes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from finetune.evaluation.evidence import Pixels

PALETTE_LEVELS = 8
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
# Ottosson, "A perceptual color space for image processing" (2020): linear sRGB -> cone responses -> OKLab.
TO_CONES = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566], [0.0883024619, 0.2817188376, 0.6299787005]])
TO_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099], [0.0259040371, 0.7827717662, -0.8086757660]])


def palette_histogram(pixels: Pixels, levels: int = PALETTE_LEVELS) -> np.ndarray:
    """(levels ** 3,) shares of RGB bins, sum 1."""
    bins = (pixels.reshape(-1, 3).astype(np.int64) * levels) // 256
    counts = np.bincount((bins[:, 0] * levels + bins[:, 1]) * levels + bins[:, 2], minlength=levels**3)
    return counts / counts.sum()


def oklab(pixels: Pixels) -> np.ndarray:
    """(H, W, 3) float64: lightness 0..1 and two opponent colours about -0.4..0.4."""
    encoded = pixels.astype(np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ TO_CONES.T) @ TO_LAB.T


def luminance(pixels: Pixels) -> np.ndarray:
    """(H, W) float64 in 0..1."""
    return pixels.astype(np.float64) @ LUMA / 255


def thumbnail(pixels: Pixels, edge: int = 16) -> np.ndarray:
    """(edge, edge, 3) OKLab of the picture squeezed to a square by area means."""
    return oklab(np.asarray(Image.fromarray(pixels).resize((edge, edge), Image.Resampling.BOX)))


def thumbnails(pictures: Sequence[Pixels], edge: int = 16) -> np.ndarray:
    """(n, edge * edge * 3), each picture's own mean colour taken out and scaled to unit length, for cosines."""
    rows = np.stack([thumbnail(pixels, edge).reshape(-1, 3) for pixels in pictures])
    rows = (rows - rows.mean(1, keepdims=True)).reshape(len(pictures), -1)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def edge_histogram(pixels: Pixels, strengths: int = 8, directions: int = 6) -> np.ndarray:
    """(strengths * directions + 1,) shares of pixels by gradient strength (log steps) and direction; last: no edge."""
    light = np.pad(luminance(pixels), 1, mode="edge")
    down, across = (light[2:, 1:-1] - light[:-2, 1:-1]) / 2, (light[1:-1, 2:] - light[1:-1, :-2]) / 2
    strength = np.hypot(down, across)
    level = np.clip(np.floor(np.log2(np.maximum(strength, 1e-9) / 0.5) + strengths), -1, strengths - 1).astype(int)
    direction = np.floor((np.arctan2(down, across) % np.pi) / np.pi * directions).astype(int) % directions
    index = np.where(level < 0, strengths * directions, level * directions + direction)
    counts = np.bincount(index.ravel(), minlength=strengths * directions + 1)
    return counts / counts.sum()


def perceptual_hash(pixels: Pixels) -> int:
    """64-bit pHash: signs of the 8x8 lowest cosine frequencies of a 32x32 grey picture around their median.

    Source: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), DCT hash.
    """
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    positions = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))
    low = (positions @ grey @ positions.T).ravel()
    bits = low > np.median(low[1:])
    return int("".join("1" if bit else "0" for bit in bits), 2)


def total_variation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Half the L1 distance of histograms along the last axis: 0 equal, 1 nothing in common."""
    return np.abs(one - other).sum(-1) / 2
