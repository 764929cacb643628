"""Run one task over many pictures in processes of their own, each picture with a deadline, the order of answers free."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from data_tools.images import Limits

AHEAD = 32  # pictures handed to one process before its answers are awaited; hides the latency of small pictures
START_SECONDS = 60.0  # a new process may need this long to import its libraries on a busy machine
Job = tuple[str, str | None]  # picture, mask


def default_workers() -> int:
    """One process per core that this process may use, at most eight."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


class _Worker:
    """One process, what it was given and has not answered, and until when its next answer must come."""

    def __init__(self, task: str, limits: Limits, cache: str | None):
        self.limits = limits
        environment = dict(os.environ, PYTHONPATH=_import_path(), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONWARNINGS="ignore")
        command = [sys.executable, "-P", "-m", "data_tools.decode_worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True)
        self.waiting: deque[int] = deque()
        self.partial = b""
        self.deadline = time.monotonic() + START_SECONDS + limits.seconds
        self._send(json.dumps({"limits": asdict(limits), "task": task, "cache": cache}))

    def give(self, number: int, job: Job) -> None:
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
        found = [tuple(json.loads(line)) for line in lines]
        for number, _ in found:
            self.waiting.remove(number)
        return found

    def stop(self) -> None:
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def _import_path() -> str:
    own = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([own, *(entry for entry in sys.path if entry and entry != own and os.path.isdir(entry))])


def run(jobs: Sequence[Job], task: str, *, limits: Limits = Limits(), workers: int | None = None, cache: str | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (index of the job, result) for every job, exactly once, as they come.

    A picture whose turn takes longer than `limits.seconds` yields code "timeout", one whose process dies "decoder_crash";
    the process is replaced and the pictures behind it are given to another. `cache`: folder of the result cache, where
    processes look up pictures whose bytes are known under another name.
    """
    pending = deque(range(len(jobs)))
    wanted = min(workers or default_workers(), max(1, len(jobs)))
    pool: list[_Worker] = []
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
                for key, _ in selector.select(timeout):
                    yield from _collect(key.data, pool, pending, selector)
                for worker in [w for w in pool if w.waiting and time.monotonic() > w.deadline]:
                    yield _replace(worker, pool, pending, selector, "timeout", f"not decoded within {limits.seconds:g} s")
        finally:
            for worker in pool:
                worker.stop()


def _share(left: int, workers: int) -> int:
    return max(1, min(AHEAD, left // workers // 2))


def _collect(worker: _Worker, pool: list[_Worker], pending: deque[int], selector: selectors.BaseSelector) -> Iterator[tuple[int, dict]]:
    found = worker.answers()
    if found is not None:
        yield from found
    elif worker.waiting:
        yield _replace(worker, pool, pending, selector, "decoder_crash", "the decoder crashed on this picture")
    else:
        _remove(worker, pool, selector)


def _replace(worker: _Worker, pool: list[_Worker], pending: deque[int], selector: selectors.BaseSelector, code: str, reason: str) -> tuple[int, dict]:
    culprit = worker.waiting.popleft()  # answers come in order, so the first without one is the one it was at
    pending.extendleft(reversed(worker.waiting))
    _remove(worker, pool, selector)
    return culprit, {"code": code, "reason": reason}


def _remove(worker: _Worker, pool: list[_Worker], selector: selectors.BaseSelector) -> None:
    selector.unregister(worker.process.stdout)
    pool.remove(worker)
    worker.stop()
