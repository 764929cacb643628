"""What near duplicates share: perceptual hashes by the `imagehash` library, and pairs of close hashes without comparing all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from PIL import Image

BITS = 64
GREY_SIDE = 16  # pixels; the small grey picture that confirms a pair
FLAT_SPREAD = 5.0  # standard deviation in 8-bit steps under which hashes say nothing
COMPARED_AT_ONCE = 1 << 20  # comparisons in one step (and at most one more run); bounds memory
LOOKUP_COST = 8.0  # of one look-up, in comparisons
WORKING_SIDE = 256  # pixels; hashes look at 32 x 32, so a first reduction to this size changes nothing that counts


def fingerprint_of(image: Image.Image) -> dict:
    """{"phash", "mirrored", "dhash": 16 hex digits, "grey": hex of 16 x 16 bytes, "flat": bool} of an RGB picture.

    phash: 64 signs of the low frequencies (DCT); dhash: 64 signs of neighbour differences; mirrored: phash left for right.
    """
    import imagehash

    grey = image.convert("L")
    if min(grey.size) > WORKING_SIDE:
        grey = grey.resize((WORKING_SIDE, WORKING_SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    small = grey.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX)
    return {
        "phash": str(imagehash.phash(grey)),
        "mirrored": str(imagehash.phash(grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT))),
        "dhash": str(imagehash.dhash(grey)),
        "grey": small.tobytes().hex(),
        "flat": bool(np.asarray(small, dtype=np.float64).std() < FLAT_SPREAD),
    }


def as_numbers(hashes: list[str]) -> np.ndarray:
    """uint64 [n] from hex digits."""
    return np.array([int(text, 16) for text in hashes], dtype=np.uint64)


def close_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs (i < j) whose uint64 hashes differ in at most `distance` bits, int64 [pairs, 2], sorted, each once.

    Multi-index hashing (Norouzi et al. 2012): of m bands, two such hashes differ in at most distance // m bits in one
    band at least, so each hash is compared only with those whose band is that close. Finds every pair.
    Equal hashes are linked as a chain (i to the next equal one), not as all pairs.
    """
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    same = inverse[order][1:] == inverse[order][:-1]
    found = [np.stack([order[:-1][same], order[1:][same]], axis=1)]
    count = _cheapest_band_count(len(distinct), distance)
    edges = [BITS * i // count for i in range(count + 1)]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        found += [first[pair] for pair in _close_in_band(distinct, low, high - low, distance // count, distance)]
    pairs = np.concatenate(found).astype(np.int64)
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _cheapest_band_count(count: int, distance: int) -> int:
    """The number of bands with the fewest expected look-ups and comparisons for `count` even spread hashes."""

    def work(bands: int) -> float:
        width = BITS // bands
        flips = sum(math.comb(width, changed) for changed in range(distance // bands + 1))
        return bands * flips * (LOOKUP_COST + count / 2.0**width)

    return min(range(2, distance + 2), key=work) if distance else 1


def _close_in_band(hashes: np.ndarray, low: int, width: int, radius: int, distance: int) -> Iterator[np.ndarray]:
    keys = (hashes >> np.uint64(low)) & np.uint64((1 << width) - 1)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    for changed in range(radius + 1):
        for bits in combinations(range(width), changed):
            wanted = keys ^ np.uint64(sum(1 << bit for bit in bits))
            start, end = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
            yield from _compare(hashes, order, start, end, distance)


def _compare(hashes: np.ndarray, order: np.ndarray, start: np.ndarray, end: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Compare each sorted place with the places start..end behind it; pairs of original indices that are close."""
    start = np.maximum(start, np.arange(1, len(start) + 1))  # each pair once: only later places
    counts = np.maximum(end - start, 0)
    total = np.cumsum(counts)
    if not len(total) or not total[-1]:
        return
    cuts = np.searchsorted(total, np.arange(COMPARED_AT_ONCE, total[-1] + COMPARED_AT_ONCE, COMPARED_AT_ONCE), "left") + 1
    for low, high in zip([0, *cuts[:-1]], cuts, strict=True):
        part = counts[low:high]
        a = np.repeat(np.arange(low, low + len(part)), part)
        b = np.arange(len(a)) - np.repeat(np.cumsum(part) - part - start[low:high], part)
        a, b = order[a], order[b]
        near = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
        yield np.stack([a[near], b[near]], axis=1)


def alike(grey: np.ndarray, pairs: np.ndarray, least: float) -> np.ndarray:
    """Which pairs have small grey pictures (uint8 [n, 256]) that correlate at least `least`; bool [pairs]."""
    if not len(pairs):
        return np.zeros(0, dtype=bool)
    kept = []
    for start in range(0, len(pairs), 100_000):
        a, b = (grey[pairs[start : start + 100_000, side]].astype(np.float64) for side in (0, 1))
        a -= a.mean(1, keepdims=True)
        b -= b.mean(1, keepdims=True)
        length = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        kept.append((a * b).sum(1) >= least * np.maximum(length, 1e-9))
    return np.concatenate(kept)


def close_vectors(vectors: np.ndarray, least_cosine: float, *, tables: int = 24, bits: int = 14) -> np.ndarray:
    """Pairs (i < j) of unit vectors [n, d] whose cosine is at least `least_cosine`, int64 [pairs, 2].

    Random-hyperplane hashing: only vectors that share a bucket in one of `tables` are compared, exactly. At cosine 0.95
    a pair is missed with probability (1 - (1 - arccos(0.95) / pi)^14)^24 = 0.2 %; closer pairs less often.
    """
    draw = np.random.Generator(np.random.PCG64(20_240_229))  # fixed, so that the same vectors give the same pairs
    powers = 1 << np.arange(bits)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for _ in range(tables):
        keys = ((vectors @ draw.standard_normal((vectors.shape[1], bits))) > 0) @ powers
        order = np.argsort(keys, kind="stable")
        active, step = np.arange(len(keys) - 1), 1
        while len(active):
            active = active[active + step < len(keys)]
            active = active[keys[order[active]] == keys[order[active + step]]]
            a, b = order[active], order[active + step]
            near = np.einsum("ij,ij->i", vectors[a], vectors[b]) >= least_cosine
            found.append(np.stack([a[near], b[near]], axis=1))
            step += 1
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
