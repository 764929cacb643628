"""Try other weights in a model without a copy of what it has: each layer gets its other weight for the time of one product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def lent_weights(layers: Sequence[nn.Module], weight_for: Callable[[int], Tensor]) -> Iterator[None]:
    """Inside the block, layer number n computes with `weight_for(n)`, of its own weight's shape and dtype, whenever it is called.

    The layers' own weights are not written to, and no more than one lent weight is in memory. Between calls a layer's weight
    is NaN, without taking memory: a model that reads weights past their layers gives itself away. For forward passes only:
    a backward pass would meet that. The weights are floating point.
    """
    import torch

    own = {layer: layer.weight.data for layer in layers}

    def lend(number: int) -> Callable[..., None]:
        def before(layer: nn.Module, _: Any) -> None:
            layer.weight.data = own[layer]
            layer.weight.data = weight_for(number)

        return before

    def take_back(layer: nn.Module, *_: Any) -> None:
        layer.weight.data = torch.full((), torch.nan, dtype=own[layer].dtype, device=own[layer].device).expand(own[layer].shape)

    hooks = [hook for number, layer in enumerate(layers) for hook in (layer.register_forward_pre_hook(lend(number)), layer.register_forward_hook(take_back))]
    try:
        for layer in layers:
            take_back(layer)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.weight.data = own[layer]
