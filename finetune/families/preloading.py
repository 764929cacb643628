"""Imports that are needed late run in the background while pictures are read, and leave out what a training run has no use for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from finetune import cycle_collection
from finetune.absent_libraries import absent
from finetune.deferred_imports import COMPILER, defer_compiler, defer_formulas, defer_part, name_later, names_later, one_process_only
from finetune.errors import BaseModelError
from finetune.families.model_index import component_slots, read_model_index
from finetune.library_lists import distributions_when_asked, load_parts_by_name, models_read_once
from finetune.shape_caches import bound_shape_caches

# In the order in which a run needs them. peft.helpers is where diffusers would meet bitsandbytes later.
NEEDED_LATE = ("peft", "peft.helpers", "diffusers.schedulers.scheduling_utils")
SAMPLERS, QUANTISER = "diffusers.schedulers.", "bitsandbytes"
# Packages that load everything in them where one thing is wanted.
TAKEN_IN_PARTS = ("diffusers.models.transformers", "diffusers.models.autoencoders")
# What peft and diffusers take names from, mostly to say that a model is none of these, and one that peft can do without: it
# divides models over processes.
NAMED_ONLY = ("transformers.activations", "transformers.modeling_outputs")
FOR_DIVIDED_MODELS = "transformers.distributed.tensor_parallel"
# What only others' ways of waiting for a server need; nothing here waits that way.
WAITS_OTHERWISE = "trio"
# peft asks whether a weight is one of these, and leaves it to others to import them.
DIVIDED_TENSORS = "torch.distributed.tensor"


def wants_scipy(base: Path) -> bool:
    """Whether the base's sampler spreads its steps by a beta distribution, the one thing for which diffusers takes scipy here."""
    try:
        return '"use_beta_sigmas": true' in (base / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    except OSError:
        return False


def transformer_class(base: Path) -> str | None:
    """Name of the class of diffusers that the base's transformer is of; None where its folder does not say."""
    try:
        library, name = component_slots(read_model_index(base))["transformer"]
    except (BaseModelError, KeyError):
        return None
    return name if library == "diffusers" else None


def _bring_scipy() -> None:
    """Let diffusers know of scipy after all, its samplers included that are there already; it says itself where there is none."""
    if importlib.util.find_spec("scipy") is None:
        return
    scipy = importlib.import_module("scipy.stats") and sys.modules["scipy"]
    importlib.import_module("diffusers.utils.import_utils")._scipy_available = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith(SAMPLERS) and "is_scipy_available" in vars(module):
            module.scipy = scipy  # type: ignore[attr-defined]


def _let_quantisers_be_found() -> None:
    """Who asks peft or diffusers for quantised layers from here on gets them."""
    of_peft, of_diffusers = importlib.import_module("peft.import_utils"), importlib.import_module("diffusers.utils.import_utils")
    of_peft.is_bnb_available.cache_clear()
    of_peft.is_bnb_4bit_available.cache_clear()
    of_diffusers._bitsandbytes_available, of_diffusers._bitsandbytes_version = of_diffusers._is_package_available(QUANTISER)  # type: ignore[attr-defined]
    layers = sys.modules.get("diffusers.quantizers.bitsandbytes.utils")
    if layers is not None and not hasattr(layers, "bnb"):
        name_later(layers, "bnb", QUANTISER)


def import_libraries(base: Path) -> None:
    """What training on this base and drawing with it need. base: its folder. Whoever loads a base comes by here.

    Libraries load others that happen to be installed, and models that nobody will use: half of the time and 200 MiB. peft looks
    again when it meets a quantised layer; what encoding and drawing need of transformers comes with their pipeline.
    """
    bound_shape_caches()
    if not all(name in sys.modules for name in NEEDED_LATE):
        _import_leanly(base)
        cycle_collection.resume()
    if wants_scipy(base):
        _bring_scipy()


def _import_leanly(base: Path) -> None:
    with ExitStack() as without:
        without.enter_context(absent(QUANTISER, "scipy", WAITS_OTHERWISE))
        without.enter_context(models_read_once())
        without.enter_context(distributions_when_asked())
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            without.enter_context(absent(FOR_DIVIDED_MODELS))
            without.enter_context(names_later("transformers", *NAMED_ONLY))
            with absent(COMPILER):
                importlib.import_module("diffusers.utils")  # takes a function of it, and has its own where there is none
            defer_compiler()
            defer_formulas()
            defer_part(DIVIDED_TENSORS)
            one_process_only()
        for package in TAKEN_IN_PARTS:
            load_parts_by_name(package)
        for name in NEEDED_LATE:
            importlib.import_module(name)
        getattr(importlib.import_module("diffusers"), transformer_class(base) or "ModelMixin", None)
    _let_quantisers_be_found()


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
