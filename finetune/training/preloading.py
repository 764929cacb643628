"""Imports that are needed late run in the background while pictures are read, and leave out what a training run has no use for."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from finetune.absent_libraries import absent
from finetune.deferred_imports import COMPILER, defer_compiler, defer_formulas, defer_part, list_models_once, names_later, one_process_only

# In the order in which a run needs them. peft.helpers is where diffusers would meet bitsandbytes later.
NEEDED_LATE = ("peft", "peft.helpers", "diffusers.models.transformers", "diffusers.schedulers.scheduling_utils")
# What peft and diffusers take names from, mostly to say that a model is none of these, and one that peft can do without: it
# divides models over processes.
NAMED_ONLY = ("transformers.activations", "transformers.modeling_outputs")
FOR_DIVIDED_MODELS = "transformers.distributed.tensor_parallel"
# peft asks whether a weight is one of these, and leaves it to others to import them.
DIVIDED_TENSORS = "torch.distributed.tensor"


def wants_scipy(base: Path) -> bool:
    """Whether the base's sampler spreads its steps by a beta distribution, the one thing for which diffusers takes scipy here."""
    try:
        return '"use_beta_sigmas": true' in (base / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    except OSError:
        return False


def import_libraries(base: Path) -> None:
    """What a run on this base needs. base: its folder.

    Libraries load others that happen to be installed, and models that nobody will use: half of the time and 200 MiB. peft looks
    again when it meets a quantised layer; what encoding and drawing need of transformers comes with their pipeline.
    """
    with ExitStack() as without:
        without.enter_context(absent("bitsandbytes", *([] if wants_scipy(base) else ["scipy"])))
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            without.enter_context(absent(FOR_DIVIDED_MODELS))
            without.enter_context(names_later("transformers", *NAMED_ONLY))
            with absent(COMPILER):
                importlib.import_module("diffusers.utils")  # takes a function of it, and has its own where there is none
            defer_compiler()
            defer_formulas()
            defer_part(DIVIDED_TENSORS)
            one_process_only()
            list_models_once()
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
