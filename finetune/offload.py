"""One part of a pipeline on the device at a time: the transformer while it denoises, the autoencoder while it decodes.

The pipeline's own call stays as it is. It says itself when it needs a part: diffusers lets an accelerate hook run before a
model's forward pass and before an autoencoder's `encode` and `decode`, and takes the device to work on from that hook.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils.memory import clear_device_cache

WAITING = torch.device("cpu")
# Of the memory that is free, what text encoders may take; the rest is for what they compute.
FOR_WEIGHTS = 0.85


def bring(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On `device`. A GPU is not waited for: from ordinary memory a copy would begin when all that it was given is done, and nothing
    more would be given to it before that."""
    waits = device.type != "cuda" or tensor.device.type != "cpu"
    return tensor.to(device) if waits else tensor.pin_memory().to(device, non_blocking=True)


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


def free_bytes(device: torch.device) -> int | None:
    """What this process can still take of a GPU; None for a device without memory of its own."""
    if device.type != "cuda":
        return None
    # What was freed counts as used as long as the allocator keeps it for the next tensors.
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def place_encoders(pipeline: Any, device: torch.device) -> int:
    """Bring a pipeline that has only text encoders to `device`. Of those that do not fit there, the largest, the products' weights stay in
    ordinary memory and come one by one. Returns the bytes of these encoders, 0 where all fit. Same states either way."""
    encoders = {part: sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers())) for part in pipeline.components.values() if isinstance(part, torch.nn.Module)}
    free, waiting = free_bytes(device), 0
    room = sum(encoders.values()) if free is None else free * FOR_WEIGHTS
    for encoder, size in sorted(encoders.items(), key=lambda found: found[1]):
        if size > room:
            bring_weights(encoder, device)
            waiting += size
        room -= size
    pipeline.to(device)
    return waiting


def bring_weights(model: torch.nn.Module, device: torch.device) -> None:
    """From now on the weights of linear layers are on `device` only for the time of their product. Those that a layer shares with
    another kind, such as an embedding, move with the model. For forward passes only.

    (accelerate's `cpu_offload` leaves weights on the meta device, and pipelines ask an encoder's weights where to put its input.)
    """
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for layer in model.modules():
        if type(layer) is not torch.nn.Linear or users[id(layer.weight)] > 1:
            continue
        home = layer.weight.data
        absent = torch.empty((), dtype=home.dtype, device=device).expand(home.shape)

        def come(layer: torch.nn.Module, _: Any, home: torch.Tensor = home) -> None:
            layer.weight.data = home.to(device)

        def go(layer: torch.nn.Module, *_: Any, absent: torch.Tensor = absent) -> None:
            layer.weight.data = absent

        layer.register_forward_pre_hook(come)
        layer.register_forward_hook(go)
        go(layer)
