"""Style gain: which part of the way from the base to the style an adapter has gone, over colours, edges and base features."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.measures import base_style, edges, palette

PARTS = (palette, edges, base_style)


def _distances(evidence: Evidence) -> np.ndarray:
    """(parts, n): each measure's distances of the pictures to the style."""
    parts = [part for part in PARTS if part.MEASURE.missing(evidence.at_hand) is None]
    return np.stack([part.values(evidence) for part in parts])


def values(evidence: Evidence) -> np.ndarray:
    """1 - distance / (the base's mean distance), averaged over the parts: 0 for the base on average, 1 at the style."""
    from dataclasses import replace

    applies = MEASURE.applies(evidence)
    if not applies.any():
        return np.full(len(evidence.pictures), np.nan)
    usual = evidence.once("style distances of the base", lambda: _distances(replace(evidence, pictures=evidence.base))[:, applies].mean(1, keepdims=True))
    return (1 - _distances(evidence) / np.maximum(usual, 1e-9)).mean(0)


MEASURE = Measure(
    "style_gain", "part of the way from the base's pictures to the style: 0 like the base, 1 at the references",
    "own: mean over palette, edges and base_style of 1 - d(adapter) / d(base)", float("-inf"), 1, "higher", ("references",), version=2, values=values)
