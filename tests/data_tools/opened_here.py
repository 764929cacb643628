"""Pictures opened in the process of the tests, for those that are about something else.

Each scan starts processes of its own to open pictures, so that a decoder that hangs or dies takes only them along. To start one
costs more than what most tests do with its answers. What the processes are for is tested in `test_scan.py`, `test_bad_inputs.py`
and `test_duplicates.py`, and by every test of a command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from data_tools import worker_pool
from data_tools.decode_worker import TASKS
from data_tools.images import Limits
from data_tools.result_cache import ResultCache


def _run(jobs: Sequence[worker_pool.Job], task: str, *, limits: Limits = Limits(), workers: int | None = None, cache: str | None = None) -> Iterator[tuple[int, dict]]:
    """As `worker_pool.run` of good pictures: what would hang or crash there does so here."""
    known = ResultCache(task, limits, Path(cache)) if cache else None
    for number, job in enumerate(jobs):
        yield number, TASKS[task](*job, limits, known)
    if known:
        known.close()


def open_here(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(worker_pool, "run", _run)
