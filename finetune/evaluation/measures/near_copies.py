"""Near-copies: pictures that are almost a training picture. The pairs themselves are shown, not only counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finetune.evaluation.evidence import Evidence, NamedPicture
from finetune.evaluation.measure import Measure
from finetune.evaluation.pixel_features import perceptual_hash, thumbnails

MOST_HASH_BITS = 6
PERCENTILE = 99.9
# However alike the training pictures are among themselves, below this cosine nothing is a copy.
SMALLEST_SIMILARITY = 0.95


@dataclass(frozen=True)
class NearestTraining:
    """For each picture: nearest training picture (index), cosine, hash distance in bits, and whether it is a near-copy."""

    index: np.ndarray
    similarity: np.ndarray
    bits: np.ndarray
    flagged: np.ndarray
    threshold: float


def _bits(one: list[int], other: list[int]) -> np.ndarray:
    mine, theirs = np.array(one, dtype=np.uint64), np.array(other, dtype=np.uint64)
    return np.bitwise_count(mine[:, None] ^ theirs[None]).astype(int)


def copy_threshold(training: np.ndarray) -> float:
    """Cosine above which a picture is nearer to a training picture than those are to each other (leave-one-out)."""
    if len(training) < 2:
        return SMALLEST_SIMILARITY
    among = training @ training.T
    np.fill_diagonal(among, -1)
    return float(max(np.percentile(among.max(1), PERCENTILE), SMALLEST_SIMILARITY))


def nearest_training(pictures: list[np.ndarray], training: list[NamedPicture], kept: tuple | None = None) -> NearestTraining:
    """Compare by colour thumbnails and by perceptual hash. kept: `training_features` of the same training pictures."""
    features, hashes, threshold = kept or training_features(training)
    mine = thumbnails(pictures)
    cosines = mine @ features.T
    bits = _bits([perceptual_hash(pixels) for pixels in pictures], hashes)
    index = cosines.argmax(1)
    rows = np.arange(len(pictures))
    similarity = cosines[rows, index]
    # Same structure (hash) and same colours (thumbnail): a hash alone takes every centred blob for a copy.
    flagged = (similarity > threshold) | ((bits <= MOST_HASH_BITS) & (cosines > SMALLEST_SIMILARITY)).any(1)
    return NearestTraining(index, similarity, bits[rows, index], flagged, threshold)


def training_features(training: list[NamedPicture]) -> tuple[np.ndarray, list[int], float]:
    """Thumbnails, hashes and the threshold of a training set."""
    features = thumbnails([picture.pixels for picture in training])
    return features, [perceptual_hash(picture.pixels) for picture in training], copy_threshold(features)


def of_evidence(evidence: Evidence) -> NearestTraining:
    kept = evidence.once("training features", lambda: training_features(list(evidence.training)))
    return nearest_training(list(evidence.pictures), list(evidence.training), kept)


def values(evidence: Evidence) -> np.ndarray:
    return of_evidence(evidence).flagged.astype(float)


MEASURE = Measure(
    "near_copies", "share of pictures nearer to a training picture than training pictures are to each other",
    "nearest neighbour above the 99.9th percentile of leave-one-out similarities (after Carlini et al. 2023), or pHash within 6 bits", 0, 1, "lower",
    ("training",), splits=("style", "holdout", "unrelated"), values=values)
