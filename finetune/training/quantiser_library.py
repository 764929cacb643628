"""bitsandbytes, which holds quantised layers and 8-bit optimizers, loaded without torch's compiler."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from finetune.errors import BadInput

LIBRARY = "bitsandbytes"


@contextmanager
def compile_later() -> Iterator[None]:
    """Within the block, `torch.compile` gives a function that is compiled when it is called first; without the block it loads the compiler at
    once, for functions that may never be called. For functions at the top of a module, by whatever options."""
    really = torch.compile

    def compile_when_called(model: Callable | None = None, **options: Any) -> Callable:
        if model is None:
            return lambda function: compile_when_called(function, **options)
        compiled: list[Callable] = []

        @functools.wraps(model)
        def run(*arguments: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(really(model, **options))
            return compiled[0](*arguments, **named)

        return run

    torch.compile = compile_when_called
    try:
        yield
    finally:
        torch.compile = really


def load_bitsandbytes() -> ModuleType:
    """The library. At import it asks for the compiler, for functions that a CPU and CUDA have better ones of: 3 s and 100 MiB."""
    if (loaded := sys.modules.get(LIBRARY)) is not None:
        return loaded
    with compile_later():
        return importlib.import_module(LIBRARY)


def require_kernels(device: torch.device, optimizer: str, hold: str | None = None) -> None:
    """Raise BadInput before any work is done where this optimizer, or a base held so, would need functions that the library has not
    brought for the GPU: it can be imported without them, and fails when they are called."""
    needing = {"training.optimizer": optimizer if optimizer.endswith("8bit") else None, "base.hold": hold if hold == "nf4" else None}
    settings = [f"{key}={value}" for key, value in needing.items() if value]
    if not settings or device.type != "cuda" or getattr(load_bitsandbytes().cextension.lib, "compiled_with_cuda", False):
        return
    raise BadInput(f"the installed {LIBRARY} has no functions for this GPU, which are needed for {' and '.join(settings)}",
                   fix=f"`python -m {LIBRARY}` says what it lacks; or set training.optimizer to adamw and base.hold to bf16 or int8")
