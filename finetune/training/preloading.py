"""Imports that are needed late run in the background while pictures are read."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# In the order in which a run needs them.
NEEDED_LATE = ("diffusers.pipelines.pipeline_utils", "peft")


def _import_all() -> None:
    for name in NEEDED_LATE:
        importlib.import_module(name)


@contextmanager
def late_imports() -> Iterator[None]:
    """Import in the background while the block runs, and wait for it at the end of the block.

    The block must not import these libraries itself: two threads that enter one cycle of imports from two ends are
    handed half-made modules by Python, which looks like a class that does not exist.
    """
    thread = threading.Thread(target=_import_all, name="late imports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
