"""Pictures in other colours: what the decoder must be able to show so that styles learnt later are not spoilt by it."""
from __future__ import annotations

import numpy as np

from .rasters import compose, luminance

NAVY, PEACH = np.array([0.09, 0.13, 0.33], np.float32), np.array([1.0, 0.80, 0.67], np.float32)


def duotone(picture: np.ndarray, dark, light) -> np.ndarray:
    """Every tone on a straight ramp from a dark to a light ink."""
    return (dark + (light - dark) * np.clip(luminance(picture) * 1.05 - 0.02, 0, 1)).astype(np.float32)


def two_inks(picture: np.ndarray, dark, light) -> np.ndarray:
    """A hard threshold, with a narrow soft edge."""
    return (dark + (light - dark) * np.clip((luminance(picture) - 0.6) * 8 + 0.5, 0, 1)).astype(np.float32)


def _gradient_size(channel: np.ndarray) -> np.ndarray:
    """Sobel gradient magnitude squared, edges repeated."""
    padded = np.pad(channel, 1, mode="edge")
    smooth = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    across = smooth[:, 2:] - smooth[:, :-2]
    smooth = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    down = smooth[2:] - smooth[:-2]
    return across ** 2 + down ** 2


def outline(picture: np.ndarray, ink, paper) -> np.ndarray:
    """Lines of one ink where the picture changes, on plain paper."""
    size = np.sqrt(sum(_gradient_size(picture[..., channel]) for channel in range(3)))
    amount = np.clip(size[..., None] * 0.8 - 0.15, 0, 1)
    return (paper * (1 - amount) + ink * amount).astype(np.float32)


def random_palette(icon: np.ndarray, ground, size, random: np.random.Generator) -> np.ndarray:
    """The icon on the ground in a randomly chosen foreign palette."""
    picture = compose(icon, ground, size)
    kind = random.random()
    if kind < 0.30:
        return picture[..., random.permutation(3)]
    first, second = random.random((2, 3)).astype(np.float32)
    if kind < 0.62:
        return duotone(picture, first, second)
    if kind < 0.82:
        return two_inks(picture, first, second)
    return outline(compose(icon, np.ones(3, np.float32), size), first, second)
