"""Exact and near duplicates, what to keep of each group, and held-out pictures that training has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.cached_tasks import cached_results
from data_tools.fingerprints import BITS, alike, as_numbers, close_pairs
from data_tools.images import Limits
from data_tools.progress import Progress
from data_tools.records import ImageRecord, LeftOut

PHASH_DISTANCE = 8  # bits of 64: the largest at which half size, JPEG, grey and blur are found and strangers are not
DHASH_DISTANCE = 6
LEAST_CORRELATION = 0.95
LOSSLESS = frozenset({".png", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".tga"})


@dataclass(frozen=True)
class DuplicateGroup:
    """Pictures that show the same. `members` begins with the one to keep; `kind` is "exact", "near" or "mirrored".

    distance: the largest number of differing bits of 64 between the kept one and another, 0 for exact copies.
    """

    kind: str
    members: tuple[ImageRecord, ...]
    distance: int

    @property
    def keep(self) -> ImageRecord:
        return self.members[0]

    @property
    def leaks(self) -> bool:
        """Whether it joins a training picture with a held-out one."""
        return {"train", "held_out"} <= {record.split for record in self.members}


@dataclass(frozen=True)
class DuplicateReport:
    """groups: largest first.  flat: pictures of one colour, that hashes cannot compare.  left_out: could not be hashed."""

    groups: tuple[DuplicateGroup, ...]
    compared: int
    flat: tuple[ImageRecord, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def leaks(self) -> list[DuplicateGroup]:
        return [group for group in self.groups if group.leaks]

    @property
    def surplus(self) -> list[ImageRecord]:
        """Every picture that is not the kept one of its group."""
        return [record for group in self.groups for record in group.members[1:]]


def find_duplicates(
    records: Sequence[ImageRecord],
    *,
    distance: int = PHASH_DISTANCE,
    mirrored: bool = False,
    pairs: np.ndarray | None = None,
    limits: Limits = Limits(),
    workers: int | None = None,
    progress: Progress = Progress(),
    use_cache: bool = True,
    cache: Path | None = None,
) -> DuplicateReport:
    """Group pictures that are the same or nearly so.

    distance: largest difference of perceptual hashes in bits, 0..20.  mirrored: also find left-right mirrored copies.
    pairs: further pairs of indices into `records`, from embeddings; int [n, 2].
    """
    results, _ = cached_results([(r.path, None) for r in records], "fingerprint", limits=limits, workers=workers, progress=progress, name="hashing pictures", use_cache=use_cache, cache=cache)
    left = [LeftOut(record.path, result["reason"], result["code"]) for record, result in zip(records, results, strict=True) if "code" in result]
    usable = [i for i, result in enumerate(results) if "code" not in result]
    flat = [records[i] for i in usable if results[i]["flat"]]
    hashed = [i for i in usable if not results[i]["flat"]]
    links = {(a, b): "exact" for a, b in _exact_links(records)}
    with progress.phase("comparing hashes", len(hashed)) as advance:
        if len(hashed) > 1:
            for kind, found in _near_links([results[i] for i in hashed], distance, mirrored):
                for a, b in found:
                    links.setdefault((hashed[a], hashed[b]), kind)
        advance(len(hashed))
    for a, b in pairs if pairs is not None else ():
        links.setdefault((min(int(a), int(b)), max(int(a), int(b))), "near")
    groups = _groups(records, results, links)
    return DuplicateReport(tuple(groups), len(hashed), tuple(flat), tuple(left))


def _exact_links(records: Sequence[ImageRecord]) -> list[tuple[int, int]]:
    last: dict[str, int] = {}
    links = []
    for i, record in enumerate(records):
        if record.content_hash in last:
            links.append((last[record.content_hash], i))
        last[record.content_hash] = i
    return links


def _near_links(results: list[dict], distance: int, mirrored: bool) -> list[tuple[str, np.ndarray]]:
    grey = np.array([np.frombuffer(bytes.fromhex(r["grey"]), dtype=np.uint8) for r in results])
    phash, dhash = (as_numbers([r[name] for r in results]) for name in ("phash", "dhash"))
    near = np.concatenate([close_pairs(phash, distance), close_pairs(dhash, min(distance, DHASH_DISTANCE))])
    found = [("near", near[alike(grey, near, LEAST_CORRELATION)])]
    if mirrored:
        count, side = len(results), int(np.sqrt(grey.shape[1]))
        both = np.concatenate([phash, as_numbers([r["mirrored"] for r in results])])
        pairs = close_pairs(both, distance)
        pairs = pairs[(pairs[:, 0] < count) & (pairs[:, 1] >= count)]
        flipped = grey.reshape(count, side, side)[:, :, ::-1].reshape(count, -1)
        agree = alike(np.concatenate([grey, flipped]), pairs, LEAST_CORRELATION)
        pairs = np.sort(np.stack([pairs[agree, 0], pairs[agree, 1] - count], axis=1), axis=1)
        found.append(("mirrored", pairs[pairs[:, 0] != pairs[:, 1]]))
    return found


def _groups(records: Sequence[ImageRecord], results: list[dict], links: dict[tuple[int, int], str]) -> list[DuplicateGroup]:
    parent = list(range(len(records)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in links:
        parent[max(root(a), root(b))] = min(root(a), root(b))
    members: dict[int, list[int]] = {}
    kinds: dict[int, set[str]] = {}
    for (a, b), kind in links.items():
        kinds.setdefault(root(a), set()).add(kind)
    for i in range(len(records)):
        if root(i) in kinds:
            members.setdefault(root(i), []).append(i)
    groups = []
    for key, inside in members.items():
        inside.sort(key=lambda i: _worth(records[i]))
        kind = next(k for k in ("near", "mirrored", "exact") if k in kinds[key])
        groups.append(DuplicateGroup(kind, tuple(records[i] for i in inside), _spread(inside, results)))
    return sorted(groups, key=lambda group: (-len(group.members), str(group.keep.path)))


def _worth(record: ImageRecord) -> tuple:
    """What to keep: the largest, then lossless, then the longest caption, then the first name."""
    return (-record.width * record.height, record.path.suffix.lower() not in LOSSLESS, -len(record.caption or ""), str(record.path))


def _spread(inside: list[int], results: list[dict]) -> int:
    hashes = [int(results[i]["phash"], 16) for i in inside if "phash" in results[i]]
    return min(BITS, max((bin(hashes[0] ^ other).count("1") for other in hashes[1:]), default=0))
