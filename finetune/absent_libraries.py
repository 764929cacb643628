"""Let a library believe for a moment that another, optional one is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """Within the block, importing these modules raises ImportError as if they were not installed; those in use already stay.

    Libraries import optional ones at their top, whether or not anybody will use them; each costs seconds and tens of MiB.
    """
    hidden = [name for name in names if name not in sys.modules]
    # None is how the import system is told that there is no such module.
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules[name] is None:
                del sys.modules[name]
