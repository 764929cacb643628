"""Scan, hash and list a made set of many small pictures, against a plain Pillow loop in the same run.

    python -m tests.benchmarks.data_scan --pictures 100000

Prints one JSON object: pictures per second and CPU microseconds a picture of each way (the second does not depend on what
else runs), a second scan from the cache, duplicates, and memory at a tenth of the set and at all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
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


def processor_seconds() -> float:
    """Of this process and of the children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(work) -> tuple[float, float, object]:
    """Wall seconds, CPU seconds, what came out."""
    started, used = time.perf_counter(), processor_seconds()
    result = work()
    return time.perf_counter() - started, processor_seconds() - used, result


def plain_loop(folder: Path) -> int:
    """What a script would do: open, decode, convert."""
    count = 0
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            image.convert("RGB").load()
        count += 1
    return count


class MemoryWatch:
    """Most resident memory of this process and of any of its children while it runs, in MiB, looked at five times a second.

    The system's own peak of a child is of no use: it begins with what its parent held when it was started.
    """

    def __init__(self) -> None:
        self.own = self.child = 0.0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look)

    def look(self) -> None:
        this = psutil.Process()
        while not self.ended.wait(0.2):
            self.own = max(self.own, this.memory_info().rss / 2**20)
            for child in this.children():
                with suppress(psutil.Error):
                    self.child = max(self.child, child.memory_info().rss / 2**20)

    def __enter__(self) -> MemoryWatch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def measure(folder: Path, count: int, workers: int | None) -> tuple[dict, list]:
    loop, loop_used, _ = timed(lambda: plain_loop(folder))
    with MemoryWatch() as first_memory:
        first, first_used, report = timed(lambda: scan_folder(folder, workers=workers))
    assert report.found == count
    del report
    with MemoryWatch() as again_memory:
        again, again_used, second = timed(lambda: scan_folder(folder, workers=workers))
    assert second.reused == count
    return {
        "plain_loop_per_second": count / loop, "plain_loop_cpu_microseconds": loop_used / count * 1e6, "scan_per_second": count / first, "scan_cpu_microseconds": first_used / count * 1e6,
        "rescan_seconds": again, "rescan_cpu_seconds": again_used, "mebibytes": first_memory.own, "mebibytes_of_a_worker": first_memory.child, "mebibytes_of_the_rescan": again_memory.own,
    }, second.records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--hashed", type=int, default=10_000, help="Pictures to hash from their pixels.")
    options = parser.parse_args()
    figures: dict = {"pictures": options.pictures, "workers": options.workers}
    with tempfile.TemporaryDirectory() as place:
        os.environ["BRUSHWORK_CACHE"] = f"{place}/cache"
        for name, count in (("tenth", options.pictures // 10), ("all", options.pictures)):
            folder = Path(place) / name
            folder.mkdir()
            make(folder, count)
            time.sleep(2.1)  # files younger than this are not cached
            figures[name], records = measure(folder, count, options.workers)
            print(json.dumps(figures[name]), flush=True)
        hashes = np.random.default_rng(0).integers(0, 2**63, options.pictures, dtype=np.uint64)
        figures["compare_hashes_seconds"], figures["compare_hashes_cpu_seconds"], _ = timed(lambda: close_pairs(hashes, 8))
        print(json.dumps(figures, indent=1), flush=True)
        wall, used, copies = timed(lambda: find_duplicates(records[: options.hashed], workers=options.workers))
        figures |= {"hash_and_group_seconds": wall, "hash_and_group_cpu_seconds": used, "groups": len(copies.groups)}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
