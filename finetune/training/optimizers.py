"""Optimizers by name, and their whole state as named tensors and JSON, so that no pickle is ever needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.errors import BadInput, RunFolderError
from finetune.training.quantiser_library import load_bitsandbytes

Json = dict[str, Any]


@dataclass(frozen=True)
class OptimizerChoice:
    """A resolved optimizer name and why it was chosen."""

    name: str
    reason: str


def choose_optimizer(name: str, device: torch.device) -> OptimizerChoice:
    """Resolve "auto". Raises BadInput where the named optimizer cannot work on `device`."""
    on_gpu = device.type == "cuda"
    if name == "auto" and on_gpu:
        return OptimizerChoice("adamw8bit", "a GPU: 8-bit moments take a quarter of the memory at the same result")
    if name == "auto":
        return OptimizerChoice("adamw", "no GPU: fused 32-bit AdamW is many times faster than 8-bit on a CPU")
    if name == "paged_adamw8bit" and not on_gpu:
        raise BadInput("paged optimizers need a CUDA device", where="training.optimizer", fix="use adamw8bit or auto")
    return OptimizerChoice(name, "asked for in the recipe")


def _bitsandbytes(class_name: str) -> Callable[..., torch.optim.Optimizer]:
    def build(parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return getattr(load_bitsandbytes().optim, class_name)(parameters, lr=learning_rate, weight_decay=weight_decay)

    return build


def _adamw(parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def _adafactor(parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    # Adafactor's steps are relative to the size of a tensor, at the least 1e-3 of the learning rate. LoRA's B starts at zero, and
    # so would not leave it: here the rate is absolute, as it is for LoRA in kohya's sd-scripts (scale_parameter=False).
    return torch.optim.Adafactor(parameters, lr=learning_rate, eps=(None, 1.0), weight_decay=weight_decay)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw8bit": _bitsandbytes("PagedAdamW8bit"),
    "adafactor": _adafactor,
    "lion8bit": _bitsandbytes("Lion8bit"),
}


def build_optimizer(name: str, parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimizer over float32 parameters, or groups of them. `name` is a key of OPTIMIZERS."""
    return OPTIMIZERS[name](list(parameters), learning_rate, weight_decay)


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace every tensor in a nested state by a reference to its path, and put it into `tensors`."""
    if isinstance(value, torch.Tensor):
        # A clone: quantisation maps are shared between parameters, and safetensors refuses shared storage.
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"items": [[key, _flatten(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"optimizer state holds a {type(value).__name__} at {path}")


def _unflatten(node: Json, tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "items" in node:
        return {key: _unflatten(item, tensors) for key, item in node["items"]}
    if "list" in node:
        return [_unflatten(item, tensors) for item in node["list"]]
    return node["value"]


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Json]:
    """(tensors by path, JSON structure that refers to them): together the whole state, without pickle."""
    tensors: dict[str, torch.Tensor] = {}
    structure = _flatten(optimizer.state_dict(), "optimizer", tensors)
    return tensors, structure


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], structure: Json) -> None:
    """Put a state written by `optimizer_state` back. Raises RunFolderError when it belongs to another optimizer."""
    try:
        optimizer.load_state_dict(_unflatten(structure, tensors))
    except (KeyError, ValueError, TypeError) as problem:
        raise RunFolderError(
            f"the checkpoint's optimizer state does not fit this optimizer ({problem})",
            fix="resume with the optimizer and adapter settings that the run was started with",
        ) from problem
