"""The bundled style: icons printed in two inks, navy on peach; one folder to learn from, one to be measured by."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .foreign_palettes import NAVY, PEACH, duotone
from .rasters import BUCKETS, ICON_EDGE, compose
from .subjects import NAMED, Subject

TRAINED, HELD_OUT = 48, 24
NAMED_HELD_OUT = ("dog-face", "owl", "fish", "sunflower", "mushroom", "strawberry", "automobile", "rocket", "house",
                  "guitar", "crown", "alarm-clock")
# Not in the style: too alike to each other, or hardly anything left of them in two inks.
UNSUITED = ("full-moon", "cloud", "envelope", "egg", "grinning-face", "crying-face", "winking-face", "sleeping-face",
            "speech-balloon", "polar-bear", "potato", "mirror", "tangerine", "green-apple", "skull")


CONTRAST = 1.7    # exponent on the tones: emoji are bright, and pale prints would look alike


def styled(icon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3]."""
    picture = duotone(compose(icon, np.ones(3, np.float32), size) ** CONTRAST, NAVY, PEACH)
    return (picture * 255).round().astype(np.uint8)


def choose(subjects: list[Subject], seed: int) -> tuple[list[int], list[int]]:
    """Rows of the subjects to learn the style from, and of those held out; never one in both."""
    order = np.random.default_rng(seed).permutation(len(subjects)).tolist()
    named = {icon for icon, _, _ in NAMED}
    held_out = [row for row in order if subjects[row].icon in NAMED_HELD_OUT]
    others = [row for row in order if subjects[row].icon not in named and subjects[row].icon not in UNSUITED]
    held_out += others[:HELD_OUT - len(held_out)]
    named_left = [row for row in order if subjects[row].icon in named and row not in held_out]
    trained = (named_left[:TRAINED // 2] + others[HELD_OUT:])[:TRAINED]
    return trained, held_out


def write_style(subjects: list[Subject], rasters: dict, seed: int, trained_folder: Path, held_out_folder: Path) -> None:
    """Mixed sizes in the folder to learn from, every sixth caption Chinese; squares with English captions held out."""
    trained, held_out = choose(subjects, seed)
    for place, row in enumerate(trained):
        size = BUCKETS[(0, 0, 1, 0, 2)[place % 5]]
        caption = subjects[row].chinese[0] if place % 6 == 5 else subjects[row].english[0]
        _write(trained_folder, subjects[row].icon, rasters[ICON_EDGE[size]][row], size, caption)
    for row in held_out:
        icon = rasters[ICON_EDGE[BUCKETS[0]]][row]
        _write(held_out_folder, subjects[row].icon, icon, BUCKETS[0], subjects[row].english[0])


def _write(folder: Path, name: str, icon: np.ndarray, size: tuple[int, int], caption: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(styled(icon, size)).save(folder / f"{name}.png", optimize=True)
    (folder / f"{name}.txt").write_text(caption + "\n", "utf-8")
