"""Imports that are needed late run in the background while pictures are read, and leave out what a training run has no use for."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.absent_libraries import absent

# In the order in which a run needs them. peft.helpers is where diffusers would meet bitsandbytes later.
NEEDED_LATE = ("peft", "peft.helpers", "diffusers.pipelines.pipeline_utils")


def wants_scipy(base: Path) -> bool:
    """Whether the base's sampler spreads its steps by a beta distribution, the one thing for which diffusers takes scipy here."""
    try:
        return '"use_beta_sigmas": true' in (base / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    except OSError:
        return False


def import_libraries(base: Path) -> None:
    """What a run on this base needs. base: its folder.

    Libraries load others that happen to be installed: a third of the time and 100 MiB. peft looks again when it meets a quantised layer.
    """
    with absent("bitsandbytes", *([] if wants_scipy(base) else ["scipy"])):
        for name in NEEDED_LATE:
            importlib.import_module(name)
    import_utils = importlib.import_module("peft.import_utils")
    import_utils.is_bnb_available.cache_clear()
    import_utils.is_bnb_4bit_available.cache_clear()


@contextmanager
def late_imports(base: Path) -> Iterator[None]:
    """Import in the background while the block runs, and wait for it at the end of the block. base: folder of the base.

    The block must not import these libraries itself: two threads that enter one cycle of imports from two ends are
    handed half-made modules by Python, which looks like a class that does not exist.
    """
    thread = threading.Thread(target=import_libraries, args=(base,), name="late imports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
