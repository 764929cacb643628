"""Who makes which entry of the cache when several processes want the same ones: each is made once, by whoever claims it first.

A claim is the operating system's lock on a small file beside the entry. A process that dies, however it dies, gives its
claims back by that, and another one makes what it left.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from finetune.errors import TrainingError
from finetune.training.encoding_cache import EncodingCache

# What file systems without locks answer. There an entry may be made twice; it is whole all the same.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


class Claims:
    """The entries that this process is making now. As a context manager it gives back whatever is left at the end."""

    def __init__(self, cache: EncodingCache):
        self._cache = cache
        self._held: dict[str, int] = {}

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def unmade(self, keys: Iterable[str]) -> Iterator[str]:
        """The keys without an entry that no other process is making, each claimed when it is yielded. Raises TrainingError
        where the cache cannot be written to."""
        for key in keys:
            if self._claim(key, wait=False):
                if self._cache.get(key) is None:
                    yield key
                else:
                    self.made(key)

    def made(self, key: str) -> None:
        """The entry of a claimed key is there now. Nobody needs its lock any more: who still waits for it finds the entry."""
        self._path(key).unlink(missing_ok=True)
        os.close(self._held.pop(key))

    def wait(self, key: str) -> None:
        """Until the process that claimed this key is done with it, or dead. Hold no claims yourself: two would wait for ever."""
        self._claim(key, wait=True)
        os.close(self._held.pop(key))

    def _path(self, key: str) -> Path:
        return self._cache.path(key).with_suffix(".claim")

    def _claim(self, key: str, wait: bool) -> bool:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as problem:
            raise TrainingError(f"cannot write to the folder of encodings: {problem.strerror}", where=str(self._cache.folder),
                                fix="free disk space, or set BRUSHWORK_CACHE to another folder") from problem
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno not in NO_LOCKS:
                os.close(descriptor)
                if isinstance(problem, BlockingIOError):
                    return False
                raise
        self._held[key] = descriptor
        return True
