"""The two scores: is the shape the right subject's, and is the palette the style's?"""
from __future__ import annotations

import numpy as np

from .rasters import luminance
from .subjects import COLOURS


def shape_vectors(pictures: np.ndarray) -> np.ndarray:
    """[n, height, width, 3] to centred unit vectors of 16x16 luminance: what is left is shape, not colour or contrast."""
    tones = luminance(np.asarray(pictures, np.float32))[..., 0]
    count, height, width = tones.shape
    small = tones.reshape(count, 16, height // 16, 16, width // 16).mean((2, 4)).reshape(count, -1)
    small = small - small.mean(1, keepdims=True)
    return small / (np.linalg.norm(small, axis=1, keepdims=True) + 1e-6)


def nearest(pictures: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """For each picture the row of the most similar true picture."""
    return (shape_vectors(pictures) @ shape_vectors(truths).T).argmax(1)


def shape_score(pictures: np.ndarray, truths: np.ndarray) -> float:
    """Share of pictures whose nearest true picture is their own; truths in the same order."""
    return float((nearest(pictures, truths) == np.arange(len(pictures))).mean())


def palette(pictures: np.ndarray) -> np.ndarray:
    """Histogram over 64 colours, four levels a channel, of all pixels together."""
    levels = np.clip((np.asarray(pictures) * 4).astype(int), 0, 3).reshape(-1, 3)
    counts = np.bincount(levels @ np.array([16, 4, 1]), minlength=64).astype(float)
    return counts / counts.sum()


def palette_distance(pictures: np.ndarray, truths: np.ndarray) -> float:
    """0 for the same colours in the same amounts, 1 for nothing in common."""
    return float(0.5 * np.abs(palette(pictures) - palette(truths)).sum())


def ground_name(picture: np.ndarray) -> str:
    """The named colour nearest to the median of the picture's rim."""
    rim = np.concatenate([picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3), picture[:, :3].reshape(-1, 3), picture[:, -3:].reshape(-1, 3)])
    colour = np.median(rim, 0) * 255
    return min(COLOURS, key=lambda name: np.abs(colour - np.array(COLOURS[name][0])).sum())
