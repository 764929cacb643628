"""Python's search for cycles of objects, put off while a command imports its libraries.

They bring half a million objects that stay. Python looks at the new ones whenever there are 700 more, and now and then at all
of them: 0.7 s of every command that loads torch and diffusers.
"""

from __future__ import annotations

import gc

# More than libraries bring; a command that needs none of them hardly makes so many.
NEW_OBJECTS = 500_000
_usual: list[tuple[int, int, int]] = []


def put_off() -> None:
    """Hardly look any more, until `resume`. For a process of our own: it changes what holds for all that runs in it."""
    if not _usual:
        _usual.append(gc.get_threshold())
        gc.set_threshold(NEW_OBJECTS, *_usual[0][1:])


def resume() -> None:
    """Look as often as before, at what is made from here on: all that is there stays. Does nothing where nothing was put off."""
    if _usual:
        gc.freeze()
        gc.set_threshold(*_usual.pop())
