"""How the frozen base weights are held while an adapter is trained on them.

    fp32, bf16, fp16   in memory in that format; products are taken in the computation's format
    int8, nf4          linear layers of attention and feed-forward quantised by bitsandbytes, the rest as in the file
    streamed           left in the mapped file (on a GPU: in pinned host memory), each weight brought in when it is used

Where a weight's format is the computation's, its layer stays the library's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from data_tools.progress import Progress
from finetune.errors import BadInput
from finetune.families.autoencoder_format import compute_in
from finetune.families.loading import weight_files
from finetune.families.mapped_pages import mapped_range, release_pages, trim_heap
from finetune.families.protocol import FamilyFacts
from finetune.families.targets import keeps_full_precision
from finetune.training.allocator import keep_freed_memory
from finetune.training.precision import DTYPES, PrecisionChoice

if TYPE_CHECKING:
    from finetune.families.base_models import BaseModel
    from finetune.training.placement_linear import Scratch

QUANTISED = ("int8", "nf4")
# Smaller weights are simply cast: bringing them in each time would cost more than they weigh.
WORTH_HOLDING = 1 << 10


@dataclass(frozen=True)
class Hold:
    """name: fp32, bf16, fp16, int8, nf4 or streamed.  compute: dtype in which products are taken.  reason: why this."""

    name: str
    compute: torch.dtype
    reason: str

    @property
    def storage(self) -> torch.dtype | None:
        """The format of the large weights in memory; None: as the file has them, or quantised."""
        return DTYPES.get(self.name)


def choose_hold(setting: str, base_dtype: PrecisionChoice, precision: PrecisionChoice) -> Hold:
    """Resolve `base.hold`; "auto" holds the weights in `base.dtype`. (`plan_fit` looks for something smaller when that does not fit.)"""
    name, reason = (base_dtype.name, base_dtype.reason) if setting == "auto" else (setting, "asked for in the recipe")
    # Weights in float32 are computed with as they are; mixed precision casts them product by product.
    return Hold(name, torch.float32 if name == "fp32" else precision.dtype, reason)


def suits(kind: str, hold: str, device: torch.device) -> bool:
    """Whether an adapter of this kind can be trained on weights held so. LoHa and LoKr add to whole weights; DoRA looks at the
    weight at every step, and on a GPU a streamed one is not where it is looked at."""
    from finetune.adapters.kinds import KINDS

    return not (KINDS[kind].whole_weights and hold == "nf4" or kind == "dora" and hold == "streamed" and device.type == "cuda")


def check_suits(kind: str, hold: Hold, device: torch.device) -> None:
    """Raise BadInput for a kind of adapter that cannot be trained on weights held so."""
    if not suits(kind, hold.name, device):
        raise BadInput(f"an adapter of the kind {kind} does not go with a base that is {hold.name} on a {device.type} device: {hold.reason}", where="base.hold",
                       fix="hold the base in int8 or bf16, or take the kind lora")


def memory_is_short(hold: Hold) -> bool:
    """Whether whoever holds the weights so wants to save memory rather than time: then large freed tensors are not kept either."""
    return hold.name in ("int8", "nf4", "streamed")


def may_quantise(name: str, facts: FamilyFacts) -> bool:
    """Whether a linear layer belongs to attention or feed-forward and is not one that the family wants in full precision."""
    pattern = facts.targets.get("attention_ff", facts.targets["attention"])
    return re.fullmatch(pattern, name) is not None and not keeps_full_precision(facts, name)


def held_linears(model: nn.Module, facts: FamilyFacts) -> dict[str, nn.Linear]:
    """The linear layers whose weights are large and used by nothing but the layer itself."""
    return {
        name: module for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.numel() >= WORTH_HOLDING and not keeps_full_precision(facts, name)
    }


def load_held(base: BaseModel, hold: Hold, device: torch.device, cache_folder: Path, progress: Progress, draws: bool = True, stay: bool = False) -> Any:
    """The family's pipeline with the transformer held as `hold` says and, where it `draws`, the VAE, both on `device`.

    stay: the transformer stays in host memory, for `sharding` to divide.
    Weights come straight from the mapped file, tensor by tensor: never twice in memory.
    """
    if device.type == "cpu":
        keep_freed_memory(stay or memory_is_short(hold))
    parts = frozenset({"transformer", "vae"} if draws else {"transformer"})
    if hold.storage == hold.compute:
        pipeline = base.family.load(base.folder, parts, hold.compute)
    else:
        pipeline = base.family.load(base.folder, parts, None)
        if hold.compute != torch.float32 and draws:
            compute_in(pipeline.vae, hold.compute)
        hold_weights(pipeline.transformer, base, hold, device, cache_folder, progress)
    if not stay:
        pipeline.to(device)
    elif draws:
        pipeline.vae.to(device)
    trim_heap()
    return pipeline


@contextmanager
def autoencoder_there(pipeline: Any, base: BaseModel, hold: Hold, device: torch.device) -> Iterator[None]:
    """Within the block the pipeline has its autoencoder, on `device`; outside it takes no memory."""
    pipeline.vae = base.family.load(base.folder, frozenset({"vae"}), hold.compute).vae.to(device)
    try:
        yield
    finally:
        pipeline.vae = None
        clear_device_cache(garbage_collection=True)
        trim_heap()


def hold_weights(model: nn.Module, base: BaseModel, hold: Hold, device: torch.device, cache_folder: Path, progress: Progress) -> None:
    """Put `hold` into effect on a transformer whose parameters are still mapped from its file."""
    from finetune.training.placement_linear import HeldLinear, Scratch
    from finetune.training.placement_quantised import quantised_weights

    facts, scratch, pinned = base.family.facts, Scratch(), PinnedMemory()
    linears = held_linears(model, facts)
    if hold.name in QUANTISED:
        wanted = [name for name in linears if may_quantise(name, facts)]
        parts_of = quantised_weights(base.folder / "transformer", wanted, hold.name, cache_folder, progress)
        for name in wanted:
            _replace(model, name, _quantised_layer(linears[name], parts_of.pop(name), hold, device, scratch))
        linears = {name: linear for name, linear in linears.items() if name not in set(wanted)}
    files = mapped_files(base)
    for name, linear in linears.items():
        weight = _cast(linear.weight.data, _format_in_memory(linear.weight.dtype, hold, device), files)
        if weight.dtype == hold.compute and device.type == "cpu":
            continue
        if device.type == "cuda" and hold.name == "streamed":
            weight = pinned.filled_with(weight)
        elif device.type == "cuda":
            weight = weight.to(device)
        # What stays in the file gives its pages back after use. In a quantised model too: where the layers that are too delicate
        # to quantise hold billions of numbers, they would weigh more than all the others.
        given_back = _file_of(weight, files) if hold.storage is None and device.type == "cpu" else range(0)
        _replace(model, name, HeldLinear(linear, weight, scratch, given_back))
    _cast_the_rest(model, hold.compute, files)
    model.computes_in = hold.compute


def _format_in_memory(in_file: torch.dtype, hold: Hold, device: torch.device) -> torch.dtype:
    """Of a large weight that is not quantised. On a CPU it stays in the mapped file; what is copied for a GPU anyway is cast on the
    way, unless it would grow."""
    if hold.storage is not None:
        return hold.storage
    return hold.compute if device.type == "cuda" and hold.compute.itemsize <= in_file.itemsize else in_file


class PinnedMemory:
    """Host memory from which a GPU copies directly, handed out piece by piece: torch's allocator rounds every request up to a power
    of two, which makes 37 GB of the 24 GB of Flux."""

    BLOCK_BYTES, ALIGNMENT = 1 << 30, 256

    def __init__(self) -> None:
        self._block, self._taken = torch.empty(0, dtype=torch.uint8), 0

    @staticmethod
    def _new_block(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def filled_with(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of `weight` there."""
        if self._taken + weight.nbytes > len(self._block):
            self._block, self._taken = self._new_block(max(self.BLOCK_BYTES, weight.nbytes)), 0
        piece = self._block[self._taken : self._taken + weight.nbytes].view(weight.dtype).view(weight.shape)
        self._taken += -(-weight.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        return piece.copy_(weight)


def pinned_bytes(model: nn.Module, facts: FamilyFacts, hold: Hold, device: torch.device, file_bytes: float) -> int:
    """Host memory that the weights of this model take, held so: whole blocks, as `PinnedMemory` takes them. file_bytes: of a number in
    the transformer's file."""
    if device.type != "cuda" or hold.name != "streamed":
        return 0
    whole, taken, end = 0, 0, 0
    for linear in held_linears(model, facts).values():
        size = int(linear.weight.numel() * min(file_bytes, hold.compute.itemsize))
        if taken + size > end:
            taken, end = 0, max(PinnedMemory.BLOCK_BYTES, size)
            whole += end
        taken += -(-size // PinnedMemory.ALIGNMENT) * PinnedMemory.ALIGNMENT
    return whole


def mapped_files(base: BaseModel) -> list[range]:
    """Addresses of the files that the transformer's weights are mapped from."""
    return [mapped_range(path) for path in weight_files(base.folder / "transformer")]


def _file_of(tensor: torch.Tensor, files: list[range]) -> range:
    """Addresses of the mapped file that the tensor lies in; empty where it lies in none."""
    return next((file for file in files if tensor.data_ptr() in file), range(0))


def give_back(tensor: torch.Tensor, files: list[range]) -> None:
    """Forget the pages of a weight in a mapped file; read again, they come back."""
    if tensor.device.type == "cpu":
        release_pages(tensor, _file_of(tensor, files))


def _cast(tensor: torch.Tensor, dtype: torch.dtype, files: list[range]) -> torch.Tensor:
    """In another format. The file's pages that were read for it are given back, so that it does not lie in memory twice."""
    cast = tensor.to(dtype)
    if cast is not tensor:
        give_back(tensor, files)
    return cast


def _quantised_layer(linear: nn.Linear, parts: dict[str, torch.Tensor], hold: Hold, device: torch.device, scratch: Scratch) -> nn.Module:
    from finetune.training.placement_quantised_linear import Int8Linear, Nf4Linear

    weight = parts.pop("").to(device)
    if hold.name == "int8":
        return Int8Linear(linear, weight, parts["SCB"].to(device), scratch)
    return Nf4Linear(linear, weight, parts, hold.compute, device, scratch)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    layer.train(model.training)
    setattr(model.get_submodule(parent), leaf, layer)


def _cast_the_rest(model: nn.Module, dtype: torch.dtype, files: list[range]) -> None:
    """Everything that is neither held nor quantised, in the computation's format. What the library keeps in float32 stays."""
    from finetune.training.placement_linear import HeldLinear

    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in model.named_modules():
        if any(part in kept for part in name.split(".")):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            is_held = leaf == "weight" and isinstance(module, HeldLinear)
            if parameter.is_floating_point() and not is_held and leaf not in kept:
                parameter.data = _cast(parameter.data, dtype, files)
