"""The only source of random numbers: every draw is named by (seed, purpose, step, index).

Nothing depends on how many numbers were drawn before, so a resumed run draws what an unbroken one would have drawn.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stable_seed(seed: int, purpose: str, step: int = 0, index: int = 0) -> int:
    """A 63-bit integer from the four names of a draw, the same on every machine and Python."""
    digest = hashlib.sha256(f"{seed}|{purpose}|{step}|{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, step: int = 0, index: int = 0) -> torch.Generator:
    """A CPU torch generator for one named draw. Draw on the CPU and move: devices then agree."""
    import torch

    return torch.Generator().manual_seed(stable_seed(seed, purpose, step, index))


def python_random(seed: int, purpose: str, step: int = 0, index: int = 0) -> random.Random:
    """The standard library's generator for one named draw (captions, shuffles)."""
    return random.Random(stable_seed(seed, purpose, step, index))
