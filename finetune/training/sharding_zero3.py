"""Spread the blocks of a frozen base over several processes with DeepSpeed: what its ZeRO-3 does with weights, without its engine.

DeepSpeed cuts the weights, keeps each process's pieces and puts a block together again. Its engine would take over the optimizer, the
clipping and the checkpoints as well. Its hooks alone never let go, in the backward pass, of a block that was called with keywords, as most
of diffusers' are, and miss weights that are read without calling their layer (tests/benchmarks/README.md). So when a block is together
is said here: while it computes, and again for its part of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

# Within it the weights are whole.
Gather = Callable[[Collection[nn.Parameter]], AbstractContextManager[None]]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _Weights(dict[str, nn.Parameter]):
    """A module's parameters. To look at them is to be shown them whole, where something is being computed."""

    def __init__(self, block: DividedBlock, parameters: dict[str, nn.Parameter]):
        super().__init__(parameters)
        self.block = block

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.block.shown(super().__getitem__(name))


class DividedBlock:
    """Makes `block` put its weights together when it looks at the first of them, and let go when another block's turn comes, or nobody's.

    weights: those that are divided.  whole: of all blocks of the model, the ones that are together at the moment.
    """

    def __init__(self, block: nn.Module, weights: Collection[nn.Parameter], gather: Gather, whole: list[DividedBlock]):
        self.weights, self.gather, self.whole, self.plain = set(weights), gather, whole, block.forward
        self.is_computing = False
        self.gathered: AbstractContextManager[None] | None = None
        self.of_storage: dict[int, nn.Parameter] = {}
        for module in block.modules():
            module._parameters = _Weights(self, module._parameters)
        block.forward = self.compute

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward; one that is checkpointed computes again later, in the backward pass, without coming by here."""
        self.is_computing = True
        try:
            with saved_tensors_hooks(self._kept_as, self._found_again):
                return self.plain(*args, **kwargs)
        finally:
            self.is_computing = False
            self.let_go()

    def shown(self, weight: nn.Parameter) -> torch.Tensor:
        """Outside of computations a parameter is what it is: to ask for its format must not make one process wait for the others."""
        if weight not in self.weights or not (self.is_computing or _in_backward()):
            return weight
        self.put_together()
        return weight.detach()  # the parameter itself will be empty for those who keep it

    def put_together(self) -> None:
        if self.gathered is not None:
            return
        for block in list(self.whole):
            block.let_go()
        self.gathered = self.gather(self.weights)
        self.gathered.__enter__()
        self.of_storage = {weight.untyped_storage().data_ptr(): weight for weight in self.weights}
        self.whole.append(self)
        if _in_backward():
            torch.autograd.Variable._execution_engine.queue_callback(self.let_go)

    def let_go(self) -> None:
        if self.gathered is not None:
            self.gathered.__exit__(None, None, None)
            self.gathered, self.of_storage = None, {}
            self.whole.remove(self)

    def _kept_as(self, tensor: torch.Tensor) -> Any:
        """For the backward pass: where to find a weight again, or the view of it that products keep. Itself it would stay whole till then."""
        weight = self.of_storage.get(tensor.untyped_storage().data_ptr())
        if weight is None:
            return tensor
        return weight, tensor.size(), tensor.stride(), tensor.storage_offset() - weight.storage_offset()

    def _found_again(self, kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        self.put_together()
        weight, size, stride, offset = kept
        return weight.detach().as_strided(size, stride, weight.storage_offset() + offset)


def divide_blocks(model: nn.Module, blocks: Sequence[nn.Module], kept_whole: Collection[nn.Parameter], offload: bool, device: torch.device) -> int:
    """Divide the parameters of `blocks` that are not `kept_whole`, in place; all else of `model` goes to `device` whole. Returns how
    many numbers of the base this process keeps.

    offload: keep the pieces in host memory, pinned where there is a GPU. Imports DeepSpeed, which takes seconds.
    """
    from deepspeed.runtime.zero import GatheredParameters, Init

    together: list[DividedBlock] = []
    taken = set(kept_whole)
    for block in blocks:
        weights = [parameter for parameter in block.parameters() if parameter not in taken]
        taken.update(weights)
        # Its own linear layer, put in the place of torch's for the whole process, would save what `_kept_as` saves.
        Init(module=nn.ParameterList(weights), mem_efficient_linear=False, remote_device="cpu" if offload else None, pin_memory=offload and device.type != "cpu")
        DividedBlock(block, weights, GatheredParameters, together)
    model.to(device)
    base = [parameter for parameter in model.parameters() if parameter not in kept_whole]
    return sum((parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter).numel() for parameter in base)
