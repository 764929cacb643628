"""Scan, hash and list a made set of many small pictures, against a plain Pillow loop in the same run.

    python -m tests.benchmarks.data_scan --pictures 100000

Prints one JSON object: pictures per second of each way, a second scan from the cache, duplicates, and peak memory at a
tenth of the set and at all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.duplicates import find_duplicates
from data_tools.fingerprints import close_pairs
from data_tools.scan import scan_folder


def make(folder: Path, count: int) -> None:
    """`count` different JPEGs of about 64 x 64 pixels, a thousand a folder."""
    generator = random.Random(0)
    for i in range(count):
        inside = folder / f"{i // 1000:04d}"
        inside.mkdir(exist_ok=True)
        small = Image.frombytes("RGB", (4, 4), generator.randbytes(48))
        small.resize((48 + i % 33, 48 + i % 29), Image.Resampling.BICUBIC).save(inside / f"{i:06d}.jpg", quality=85)


def timed(work) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def plain_loop(folder: Path) -> int:
    """What a script would do: open, decode, convert."""
    count = 0
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            image.convert("RGB").load()
        count += 1
    return count


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=None)
    options = parser.parse_args()
    figures: dict = {"pictures": options.pictures, "workers": options.workers}
    with tempfile.TemporaryDirectory() as place:
        os.environ["BRUSHWORK_CACHE"] = f"{place}/cache"
        for name, count in (("tenth", options.pictures // 10), ("all", options.pictures)):
            folder = Path(place) / name
            folder.mkdir()
            make(folder, count)
            time.sleep(2.1)  # files younger than this are not cached
            loop, _ = timed(lambda folder=folder: plain_loop(folder))
            first, report = timed(lambda folder=folder: scan_folder(folder, workers=options.workers))
            again, second = timed(lambda folder=folder: scan_folder(folder, workers=options.workers))
            assert report.found == count == second.reused
            figures[name] = {"plain_loop_per_second": count / loop, "scan_per_second": count / first, "rescan_seconds": again, "peak_mebibytes": peak_mebibytes()}
        hashing, copies = timed(lambda: find_duplicates(report.records, workers=options.workers))
        figures["hash_and_group_seconds"], figures["groups"] = hashing, len(copies.groups)
        hashes = np.random.default_rng(0).integers(0, 2**63, options.pictures, dtype=np.uint64)
        figures["compare_seconds"], _ = timed(lambda: close_pairs(hashes, 8))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
