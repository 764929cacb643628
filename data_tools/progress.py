"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from data_tools.records import shown_line

PLAIN_LINE_EVERY_SECONDS = 5.0


class Progress:
    """Where rooms report what they do. `quiet` says nothing at all; the base of both forms below."""

    def say(self, text: str) -> None:
        """One line for the user."""

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Yield `advance(count=1, note="")`, to be called as the work of this phase goes on."""
        yield lambda count=1, note="": None


class PlainProgress(Progress):
    """Lines for logs and pipes: the start, one every few seconds, the end."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr

    def say(self, text: str) -> None:
        print(shown_line(text), file=self.stream, flush=True)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        started = last = time.monotonic()
        done = 0

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last < PLAIN_LINE_EVERY_SECONDS:
                return
            last = now
            rate = done / max(now - started, 1e-9)
            of = f"/{total}, {(total - done) / rate:.0f} s left" if total and rate else ""
            self.say(f"{name}: {done}{of} ({rate:.2f}/s) {note}".rstrip())

        self.say(f"{name} ...")
        yield advance
        self.say(f"{name}: {done} done in {time.monotonic() - started:.1f} s" if done else f"{name}: done in {time.monotonic() - started:.1f} s")


class RichProgress(Progress):
    """Bars with rate and time left."""

    def __init__(self):
        from rich.console import Console

        self.console = Console(stderr=True)

    def say(self, text: str) -> None:
        self.console.print(shown_line(text), markup=False, highlight=False)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))
        with Bars(*columns, console=self.console) as bars:
            task = bars.add_task(name, total=total, note="")
            yield lambda count=1, note="": bars.update(task, advance=count, **({"note": note} if note else {}))


def for_terminal(quiet: bool = False) -> Progress:
    """Bars on a terminal, plain lines elsewhere, nothing with `quiet`."""
    if quiet:
        return Progress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()
