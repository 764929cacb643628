"""bitsandbytes, which holds quantised layers and 8-bit optimizers, loaded without torch's compiler."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from finetune.deferred_imports import compile_later
from finetune.errors import BadInput

LIBRARY = "bitsandbytes"
OPTIMIZERS = ("adamw8bit", "paged_adamw8bit", "lion8bit")


def load_bitsandbytes() -> ModuleType:
    """The library. At import it asks for the compiler, for functions that a CPU and CUDA have better ones of: 3 s and 100 MiB."""
    if (loaded := sys.modules.get(LIBRARY)) is not None:
        return loaded
    with compile_later():
        return importlib.import_module(LIBRARY)


def require_kernels(optimizer: str, hold: str, device: torch.device) -> None:
    """Raise BadInput before any work is done where this optimizer, or a base held so, would need functions that the library has not brought for
    the GPU: it can be imported without them, and fails when they are called."""
    settings = [f"training.optimizer={optimizer}"] * (optimizer in OPTIMIZERS) + [f"base.hold={hold}"] * (hold == "nf4")
    if not settings or device.type != "cuda" or getattr(load_bitsandbytes().cextension.lib, "compiled_with_cuda", False):
        return
    raise BadInput(f"the installed {LIBRARY} has no functions for this GPU, which {' and '.join(settings)} need{'s' * (len(settings) == 1)}", where="training.optimizer" if optimizer in OPTIMIZERS else "base.hold",
                   fix=f"`python -m {LIBRARY}` says what it lacks; or set training.optimizer to adamw and base.hold to bf16 or int8")
