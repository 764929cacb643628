"""Count what a computation would need without doing it: it runs on torch's meta device, which has shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from finetune.training.plan_repeats import RepeatedResults


@dataclass(frozen=True)
class Trace:
    """flops: of products (a multiply-add is two).  peak_bytes: most memory of results alive at once, beyond what was
    there before.  kept_bytes: what is alive at the end.  operations: calls into the tensor library.
    events: bytes of every allocation in turn; -1 - place where the one at that place is freed.  attention_flops: of `flops`.
    is_final: False where peak_bytes should have been the heap's, which did not answer in time."""

    flops: int
    peak_bytes: int
    kept_bytes: int
    operations: int
    events: list[int] = field(default_factory=list, repr=False)
    attention_flops: int = 0
    is_final: bool = True

    @property
    def moved_bytes(self) -> int:
        """Of all results together."""
        return sum(size for size in self.events if size > 0)

    def bytes_in_large(self, least: float) -> int:
        """Of the results that have at least so many bytes."""
        return sum(size for size in self.events if size >= max(least, 1))


class _Recorder(TorchDispatchMode):
    """Adds up storages as they come and go, and the work of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.attention_flops = self.operations = 0
        self.events: list[int] = []
        self._alive: dict[int, Any] = {}
        self._results = RepeatedResults()

    def _gone(self, key: int, size: int, place: int) -> None:
        self._alive.pop(key, None)
        self.live -= size
        self.events.append(-1 - place)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = weakref.finalize(storage, self._gone, key, size, len(self.events))
        self._alive[key].atexit = False
        self.events.append(size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def count_attention(self, flops: int) -> None:
        self.flops += flops
        self.attention_flops += flops

    def watch_already_there(self, tensors: list[Tensor]) -> None:
        """Storages that exist before: views of them are no new memory."""
        for tensor in tensors:
            self._alive.setdefault(tensor.untyped_storage()._cdata, tensor)

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = self._results.of(operation, args, kwargs or {})
        self.operations += 1
        work = flop_registry.get(operation._overloadpacket)
        if work is not None:
            self.flops += work(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._see(leaf)
        return result


class _FusedAttention(torch.autograd.Function):
    """What fused attention allocates and keeps: the output and one number a row, never the matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, recorder: _Recorder) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        # Two products forward, four backward, over all pairs of tokens.
        ctx.products, ctx.recorder = 2 * query.numel() * key.shape[-2], recorder
        recorder.count_attention(2 * ctx.products)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.recorder.count_attention(4 * ctx.products)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextmanager
def _fused_attention(recorder: _Recorder) -> Iterator[None]:
    """On the meta device torch would take the attention that builds the whole matrix. Put in place of the function itself,
    since autograd calls it again when it computes a checkpointed block a second time."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _FusedAttention.apply(query, key, value, recorder)

    original = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


def trace(compute: Callable[[], Any], already_there: list[Tensor]) -> Trace:
    """Run `compute`, whose tensors are on the meta device, and count. already_there: parameters and inputs."""
    recorder = _Recorder()
    recorder.watch_already_there(already_there)
    with recorder, _fused_attention(recorder), _config.patch(meta_nonzero_assume_all_nonzero=True):
        result = compute()
    found = Trace(recorder.flops, recorder.peak, recorder.live, recorder.operations, recorder.events, recorder.attention_flops)
    del result
    return found
