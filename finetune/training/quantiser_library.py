"""bitsandbytes, which holds quantised layers and 8-bit optimizers, loaded without torch's compiler."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from finetune.deferred_imports import compile_later

LIBRARY = "bitsandbytes"


def load_bitsandbytes() -> ModuleType:
    """The library. At import it asks for the compiler, for functions that a CPU and CUDA have better ones of: 3 s and 100 MiB."""
    if (loaded := sys.modules.get(LIBRARY)) is not None:
        return loaded
    with compile_later():
        return importlib.import_module(LIBRARY)
