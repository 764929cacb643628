"""One part of a pipeline on the device at a time: the transformer while it denoises, the autoencoder while it decodes.

The pipeline's own call stays as it is. It says itself when it needs a part: diffusers lets an accelerate hook run before a
model's forward pass and before an autoencoder's `encode` and `decode`, and takes the device to work on from that hook.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils.memory import clear_device_cache

WAITING = torch.device("cpu")


class Turn(ModelHook):
    """Brings its part to `execution_device` (the name that diffusers looks for) after the other parts have left it."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.execution_device = device
        self.others: list[torch.nn.Module] = []
        self.here = False

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.here:
            for other in self.others:
                other.to(WAITING)
                other._hf_hook.here = False
            clear_device_cache()
            module.to(self.execution_device)
            self.here = True
        return args, kwargs


def take_turns(pipeline: Any, device: torch.device) -> None:
    """From now on at most one of the pipeline's models is on `device`, each from when it is needed until another is.

    Call it before anything of the pipeline was placed; weights that wait are in ordinary memory.
    """
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for part in parts:
        turn = Turn(device)
        turn.others = [other for other in parts if other is not part]
        add_hook_to_module(part, turn)


def working_device(part: torch.nn.Module) -> torch.device:
    """Where a part computes: where its turn will bring it, else where its weights are."""
    turn = getattr(part, "_hf_hook", None)
    return turn.execution_device if isinstance(turn, Turn) else next(part.parameters()).device
