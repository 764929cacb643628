"""What was found out about a picture, kept by the hash of its bytes, so that an unchanged folder is not decoded again.

One SQLite file in the user's cache folder. Two tables: the hash of a file by (path, size, times, inode), and results by
(hash, task and limits). Losing or breaking the file costs time, never correctness.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from data_tools.images import Limits

VERSION = 1  # raise when the meaning of a result changes
FRESH_NANOSECONDS = 2_000_000_000  # a file changed this recently may change again within the clock's step; it is read again
CHUNK = 400  # rows per query, under SQLite's limit of variables
# A result that another attempt could change is not kept.
PASSING_CODES = frozenset({"timeout", "decoder_crash", "missing", "no_permission", "unreadable", "too_much_memory", "needs_plugin"})


def cache_folder() -> Path:
    """$BRUSHWORK_CACHE, or brushwork/ in the user's cache folder."""
    own = os.environ.get("BRUSHWORK_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brushwork"


class ResultCache:
    """Results of one task under given limits. Without a usable cache file it remembers nothing, and all still works."""

    def __init__(self, task: str, limits: Limits, folder: Path | None = None):
        settings = json.dumps([VERSION, task, {k: v for k, v in asdict(limits).items() if k != "seconds"}], sort_keys=True)
        self.settings = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self.database = _open((folder or cache_folder()) / "pictures.sqlite")

    def known(self, paths: Sequence[Path]) -> dict[Path, dict]:
        """Results of those paths whose files are unchanged since they were kept."""
        if self.database is None:
            return {}
        found: dict[Path, dict] = {}
        for start in range(0, len(paths), CHUNK):
            stamps = {_key(path): (path, stamp) for path in paths[start : start + CHUNK] if (stamp := file_stamp(path))}
            marks = ",".join("?" * len(stamps))
            query = f"SELECT f.path, f.stamp, r.result FROM files f JOIN results r ON r.hash = f.hash AND r.settings = ? WHERE f.path IN ({marks})"
            for key, stamp, result in self._rows(query, [self.settings, *stamps]):
                if stamps[key][1] == stamp:
                    found[stamps[key][0]] = compact(json.loads(result))
        return found

    def of_content(self, content_hash: str) -> dict | None:
        """The result for a picture with these bytes, whatever it was called."""
        rows = self._rows("SELECT result FROM results WHERE hash = ? AND settings = ?", [content_hash, self.settings])
        return json.loads(rows[0][0]) if rows else None

    def keep(self, results: Iterable[tuple[Path, str, str, dict]]) -> None:
        """Remember (path, stamp before it was read, content hash, result)."""
        if self.database is None:
            return
        files, kept = [], []
        for path, stamp, content_hash, result in results:
            if not content_hash or result.get("code") in PASSING_CODES or file_stamp(path) != stamp:
                continue
            files.append((_key(path), stamp, content_hash))
            kept.append((content_hash, self.settings, json.dumps(result)))
        try:
            with self.database:
                self.database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", files)
                self.database.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", kept)
        except sqlite3.Error:
            self.database = None  # full disk or a broken file: go on without

    def _rows(self, query: str, values: list) -> list[tuple]:
        try:
            return self.database.execute(query, values).fetchall() if self.database else []
        except sqlite3.Error:
            self.database = None
            return []

    def close(self) -> None:
        """Let go of the file."""
        if self.database is not None:
            self.database.close()


def compact(result: dict) -> dict:
    """The same result, its short words shared with those of other pictures."""
    return {name: sys.intern(value) if name in ("format", "mode", "code") else value for name, value in result.items()}


def _open(path: Path) -> sqlite3.Connection | None:
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(path, timeout=10)
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute("CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT, hash TEXT) WITHOUT ROWID")
            database.execute("CREATE TABLE IF NOT EXISTS results (hash TEXT, settings TEXT, result TEXT, PRIMARY KEY (hash, settings)) WITHOUT ROWID")
            return database
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                return None
            path.unlink(missing_ok=True)  # not a database any more: begin a new one
        except OSError:
            return None
    return None


def _key(path: Path) -> str:
    return os.fsencode(os.path.abspath(path)).hex()


def file_stamp(path: Path) -> str:
    """Size, times and inode of a file as one text; "" when it has none or was changed too recently to be trusted."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    newest = max(status.st_mtime_ns, status.st_ctime_ns)
    if time.time_ns() - newest < FRESH_NANOSECONDS:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"
