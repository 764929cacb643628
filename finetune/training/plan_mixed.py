"""What autocast does to a step on a GPU, done to one on torch's meta device, which autocast passes by.

Of a model in 16 bits it is not half of what the same step takes in float32: norms hand on float32, a LoRA's factors are float32,
and products keep casts of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from finetune.adapters import shared_input

# Of torch's lists for CUDA (ATen/autocast_mode.h), by the names under which models call them.
PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d"})
IN_FULL = frozenset({"layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "pow", "__pow__", "rsqrt", "reciprocal", "exp", "log", "sum", "prod", "cumsum", "norm", "softplus"})


class AsAutocast(TorchFunctionMode):
    """Within the block, products and attention take their operands in `dtype`, and what needs digits takes them in float32."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __enter__(self) -> AsAutocast:
        # What stands here while a step is traced is no function that a mode is told of.
        self._attention, self._format = F.scaled_dot_product_attention, shared_input.autocast_format
        F.scaled_dot_product_attention, shared_input.autocast_format = self._attend, lambda _: self.dtype
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        F.scaled_dot_product_attention, shared_input.autocast_format = self._attention, self._format

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Tensor:
        return self._attention(*(_cast(states, self.dtype) for states in (query, key, value)), *more, **named)

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        wanted = self.dtype if name in PRODUCTS else torch.float32 if name in IN_FULL else None
        if wanted is not None:
            args, kwargs = tuple(_cast(value, wanted) for value in args), {key: _cast(value, wanted) for key, value in kwargs.items()}
        return function(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def hold_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """The frozen weights in this format, in which the model then computes; a trained adapter stays in its own."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.computes_in = dtype
