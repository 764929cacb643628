"""Run a task of `decode_worker` over pictures, taking what is already known from the result cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_tools import worker_pool
from data_tools.images import Limits
from data_tools.progress import Progress
from data_tools.result_cache import ResultCache, cache_folder, compact, file_stamp

Picture = tuple[Path, Path | None]  # and its mask
KEEP_EVERY = 500  # pictures between two writes to the result cache: what a stop can lose


class _HandedOut(Sequence[worker_pool.Job]):
    """What the pool is given, made when it is asked for: of a hundred thousand pictures only those under way are in memory twice.

    stamps: place in `jobs` -> stamp of the file just before it was handed out, until somebody takes it.
    """

    def __init__(self, jobs: Sequence[Picture], todo: Sequence[int]):
        self.jobs, self.todo, self.stamps = jobs, todo, dict[int, str]()

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, number: int) -> worker_pool.Job:
        path, mask = self.jobs[self.todo[number]]
        self.stamps[self.todo[number]] = file_stamp(path)
        return str(path), str(mask) if mask else None


def cached_results(
    jobs: Sequence[Picture],
    task: str,
    *,
    limits: Limits = Limits(),
    workers: int | None = None,
    progress: Progress = Progress(),
    name: str = "checking pictures",
    use_cache: bool = True,
    cache: Path | None = None,
) -> tuple[list[dict], int]:
    """One result for each (picture, mask), in order, and how many came from the cache. See `decode_worker` for results.

    A picture with a mask is always looked at, because the mask is not part of the picture's hash.
    """
    kept = ResultCache(task, limits, cache) if use_cache else None
    known = kept.known([path for path, mask in jobs if mask is None]) if kept else {}
    results: list[dict | None] = [known.get(path) if mask is None else None for path, mask in jobs]
    todo = [i for i, result in enumerate(results) if result is None]
    del known
    given = _HandedOut(jobs, todo)
    fresh: list[tuple[Path, str, str, dict]] = []
    lookup = str(cache or cache_folder()) if use_cache else None
    with progress.phase(name, len(todo)) as advance:
        for number, result in worker_pool.run(given, task, limits=limits, workers=workers, cache=lookup):
            index = todo[number]
            results[index] = result = compact(result)
            stamp = given.stamps.pop(index)
            if jobs[index][1] is None and stamp:
                fresh.append((jobs[index][0], stamp, result.get("hash", ""), result))
            if kept and len(fresh) >= KEEP_EVERY:
                kept.keep(fresh)
                fresh.clear()
            advance(1)
    if kept:
        kept.keep(fresh)
        kept.close()
    return results, len(jobs) - len(todo)
