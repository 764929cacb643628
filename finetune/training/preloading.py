"""Imports that are needed late run in the background while pictures are read and the cache is checked."""

from __future__ import annotations

import importlib
import threading

# In the order in which a run needs them.
NEEDED_LATE = ("diffusers.pipelines.pipeline_utils", "peft")


def _import_all() -> None:
    for name in NEEDED_LATE:
        importlib.import_module(name)


def preload() -> None:
    """Start the imports; whoever needs one earlier simply waits for it on the import lock."""
    threading.Thread(target=_import_all, name="preload", daemon=True).start()
