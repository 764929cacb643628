"""Run a task of `decode_worker` over pictures, taking what is already known from the result cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_tools import worker_pool
from data_tools.images import Limits
from data_tools.progress import Progress
from data_tools.result_cache import ResultCache, cache_folder, file_stamp

KEEP_EVERY = 500  # pictures between two writes to the result cache: what a stop can lose


def cached_results(
    jobs: Sequence[tuple[Path, Path | None]],
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
    stamps = {i: file_stamp(jobs[i][0]) for i in todo}
    fresh: list[tuple[Path, str, str, dict]] = []
    lookup = str(cache or cache_folder()) if use_cache else None
    with progress.phase(name, len(todo)) as advance:
        given = [(str(jobs[i][0]), str(jobs[i][1]) if jobs[i][1] else None) for i in todo]
        for number, result in worker_pool.run(given, task, limits=limits, workers=workers, cache=lookup):
            index = todo[number]
            results[index] = result
            if jobs[index][1] is None and stamps[index]:
                fresh.append((jobs[index][0], stamps[index], result.get("hash", ""), result))
            if kept and len(fresh) >= KEEP_EVERY:
                kept.keep(fresh)
                fresh.clear()
            advance(1)
    if kept:
        kept.keep(fresh)
        kept.close()
    return results, len(jobs) - len(todo)
