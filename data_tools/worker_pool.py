"""Run one task over many pictures in processes of their own, each picture with a deadline, the order of answers free."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from data_tools.errors import DataError
from data_tools.images import Limits
from data_tools.records import shown_name

AHEAD = 32  # pictures handed to one process before its answers are awaited; hides the latency of small pictures
START_SECONDS = 120.0  # a new process may need this long to import its libraries on a busy machine
FAILED_STARTS = 3  # in a row: then it is not the pictures, and no further process will do better
Job = tuple[str, str | None]  # picture, mask


def default_workers() -> int:
    """One process per core that this process may use, at most eight."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


class _Worker:
    """One process, what it was given and has not answered, and until when its next answer must come.

    ready: it has said that it works. One that ends before has a fault of its own, whatever picture it was given; last_words tells it.
    """

    def __init__(self, task: str, limits: Limits, cache: str | None):
        self.limits, self.ready, self.last_words = limits, False, ""
        self.complaints = tempfile.TemporaryFile()  # what it prints until it is ready
        environment = dict(os.environ, PYTHONPATH=_import_path(), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONWARNINGS="ignore")
        command = [sys.executable, "-P", "-m", "data_tools.decode_worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, env=environment, start_new_session=True)
        self.waiting: deque[int] = deque()
        self.partial = b""
        self.deadline = time.monotonic() + START_SECONDS
        self._send(json.dumps({"limits": asdict(limits), "task": task, "cache": cache}))

    def give(self, number: int, job: Job) -> None:
        if self.ready and not self.waiting:
            self.deadline = time.monotonic() + self.limits.seconds
        self.waiting.append(number)
        self._send(json.dumps([number, *job]))

    def _send(self, line: str) -> None:
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # it died; reading its answers will tell
            pass

    def answers(self) -> list[tuple[int, dict]] | None:
        """What it said since the last call; None when it is gone."""
        content = os.read(self.process.stdout.fileno(), 1 << 16)
        if not content:
            return None
        *lines, self.partial = (self.partial + content).split(b"\n")
        self.deadline = time.monotonic() + self.limits.seconds
        if lines and not self.ready:
            self.ready = True
            self.complaints.close()
            lines = lines[1:]
        found = [tuple(json.loads(line)) for line in lines]
        for number, _ in found:
            self.waiting.remove(number)
        return found

    def stop(self) -> None:
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        if not self.ready:
            self.last_words = _last_line(self.complaints)
        self.complaints.close()


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = [line.strip() for line in file.read().decode("utf-8", "replace").split("\n")]
    return shown_name(next((line for line in reversed(lines) if line), "they end without a word"))[:300]


def _import_path() -> str:
    own = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([own, *(entry for entry in sys.path if entry and entry != own and os.path.isdir(entry))])


def run(jobs: Sequence[Job], task: str, *, limits: Limits = Limits(), workers: int | None = None, cache: str | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (index of the job, result) for every job, exactly once, as they come.

    A picture whose turn takes longer than `limits.seconds` yields code "timeout", one whose process dies "decoder_crash";
    the process is replaced and the pictures behind it are given to another. `cache`: folder of the result cache, where
    processes look up pictures whose bytes are known under another name.
    Raises DataError when processes cannot start at all (a library is missing or broken): that says nothing of the pictures.
    """
    pending = deque(range(len(jobs)))
    wanted = min(workers or default_workers(), max(1, len(jobs)))
    pool: list[_Worker] = []
    failed_starts = 0
    with selectors.DefaultSelector() as selector:
        try:
            while pending or any(worker.waiting for worker in pool):
                while len(pool) < wanted and pending:
                    pool.append(_Worker(task, limits, cache))
                    selector.register(pool[-1].process.stdout, selectors.EVENT_READ, pool[-1])
                for worker in pool:
                    while pending and len(worker.waiting) < _share(len(pending), len(pool)):
                        worker.give(pending[0], jobs[pending.popleft()])
                timeout = max(0.0, min(worker.deadline for worker in pool if worker.waiting) - time.monotonic())
                gone: list[_Worker] = []
                for key, _ in selector.select(timeout):
                    worker = key.data
                    found = worker.answers()
                    gone += [worker] if found is None else []
                    failed_starts = 0 if worker.ready else failed_starts
                    yield from found or ()
                late = [worker for worker in pool if worker not in gone and worker.waiting and time.monotonic() > worker.deadline]
                for worker in [*gone, *late]:
                    selector.unregister(worker.process.stdout)
                    pool.remove(worker)
                    worker.stop()
                    if worker.ready:
                        yield from _blame(worker, pending, f"not decoded within {limits.seconds:g} s" if worker in late else None)
                        continue
                    failed_starts += 1
                    pending.extendleft(reversed(worker.waiting))
                    if failed_starts == FAILED_STARTS:
                        raise DataError(f"the processes that open pictures cannot start: {worker.last_words}", fix="look at `brushwork doctor`, or install the package and its dependencies again")
        finally:
            for worker in pool:
                worker.stop()


def _share(left: int, workers: int) -> int:
    return max(1, min(AHEAD, left // workers // 2))


def _blame(worker: _Worker, pending: deque[int], late: str | None) -> Iterator[tuple[int, dict]]:
    """The picture that a process died at or hung on, told by `late`; the ones behind it go back to the others."""
    if not worker.waiting:
        return
    culprit = worker.waiting.popleft()  # answers come in order, so the first without one is the one it was at
    pending.extendleft(reversed(worker.waiting))
    yield culprit, {"code": "timeout", "reason": late} if late else {"code": "decoder_crash", "reason": "the decoder crashed on this picture"}

